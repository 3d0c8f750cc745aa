//! Any bytes load as a GGUF model or give an error.
#![no_main]

libfuzzer_sys::fuzz_target!(init: farthing_fuzz::large::gguf(), |bytes: &[u8]| farthing_fuzz::model(bytes));
