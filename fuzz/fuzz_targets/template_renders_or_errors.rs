//! Any text renders as a chat template or gives an error.
#![no_main]

libfuzzer_sys::fuzz_target!(init: farthing_fuzz::text::large_templates(), |bytes: &[u8]| {
    farthing_fuzz::text::template(&String::from_utf8_lossy(bytes));
});
