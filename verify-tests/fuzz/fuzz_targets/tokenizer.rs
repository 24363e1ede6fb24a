#![no_main]
treespark_parser_fuzz::target!(tokenizer);
