#![no_main]
treespark_parser_fuzz::target!(gguf_vocabulary);
