// How a batch lies in memory: the words of kernel-gen/src/layout.rs.
//
// rows      [rows, ROW_WORDS]: token, position, request, node, ancestor words
// requests  [HEADER_WORDS + requests * REQUEST_WORDS]: header n_rows, n_requests; then prefix, first row, rows, ...

const ROW_WORDS: u32 = 12u;
const ROW_TOKEN: u32 = 0u;
const ROW_POSITION: u32 = 1u;
const ROW_REQUEST: u32 = 2u;
const ROW_NODE: u32 = 3u;
const ROW_ANCESTORS: u32 = 4u;

const HEADER_WORDS: u32 = 4u;
const REQUEST_WORDS: u32 = 12u;
const REQUEST_PREFIX: u32 = 0u;
const REQUEST_FIRST_ROW: u32 = 1u;
const REQUEST_ROWS: u32 = 2u;

const NONE: u32 = 0xffffffffu;
