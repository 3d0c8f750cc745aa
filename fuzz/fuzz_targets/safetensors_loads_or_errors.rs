//! Any bytes load as a safetensors model or give an error.
#![no_main]

libfuzzer_sys::fuzz_target!(init: farthing_fuzz::large::safetensors_files(), |bytes: &[u8]| {
    farthing_fuzz::model(bytes);
    // Mutations of the header seldom keep its length right, so the same bytes are also read with the length mended.
    if let Some(last) = bytes.iter().rposition(|&byte| byte == b'}').filter(|&last| last >= 8) {
        let mut mended = bytes.to_vec();
        mended[..8].copy_from_slice(&(last as u64 - 7).to_le_bytes());
        farthing_fuzz::model(&mended);
    }
});
