//! Any bytes load as a tokenizer, from `tokenizer.json` or from the lists of GGUF metadata, or give an error.
#![no_main]

libfuzzer_sys::fuzz_target!(init: farthing_fuzz::text::large_tokenizers(), |bytes: &[u8]| {
    farthing_fuzz::text::tokenizer(bytes);
    farthing_fuzz::text::vocabulary(bytes);
});
