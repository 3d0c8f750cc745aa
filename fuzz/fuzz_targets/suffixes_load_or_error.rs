//! Any bytes, their checksum aside, load as a suffix store or give an error.
#![no_main]

use farthing::speculative::draft::SuffixStore;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let store = SuffixStore::new(1 << 20).expect("enough memory");
    let loaded = farthing_fuzz::bounded(bytes.len(), || store.load_texts("store", bytes));
    if let Err(error) = loaded {
        assert!(error.to_string().contains("got"), "{error}");
    }
});
