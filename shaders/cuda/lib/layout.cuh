// How a batch lies in memory: the words of kernel-gen/src/layout.rs.
//
// rows      [rows, ROW_WORDS]: token, position, request, node, ancestor words
// requests  [HEADER_WORDS + requests * REQUEST_WORDS]: header n_rows, n_requests; then prefix, first row, rows, ...

constexpr u32 ROW_WORDS = 12;
constexpr u32 ROW_TOKEN = 0;
constexpr u32 ROW_POSITION = 1;
constexpr u32 ROW_REQUEST = 2;
constexpr u32 ROW_NODE = 3;
constexpr u32 ROW_ANCESTORS = 4;

constexpr u32 HEADER_WORDS = 4;
constexpr u32 REQUEST_WORDS = 12;
constexpr u32 REQUEST_PREFIX = 0;
constexpr u32 REQUEST_FIRST_ROW = 1;
constexpr u32 REQUEST_ROWS = 2;
constexpr u32 REQUEST_GIVEN = 11;

constexpr u32 MAX_NODES = 256;
constexpr u32 NONE = 0xffffffffu;
