// What the machine does that kernels run on. One object file serves the libraries of all kernels.
//
//   threads.h   threads and warps, and what they wait for
//   barriers.h  barriers of blocks and clusters, barriers in memory, copies under way
//   launch.h    how a launch runs
//   products.h  what the lanes of a warp do together with matrices
#include "launch.h"
#include "products.h"
