#![no_main]
treespark_parser_fuzz::target!(shards);
