//! Text that comes out token by token, and the texts that end it.

use crate::shared::fixture;
use crate::tokenizers::vocabulary;
use farthing::detokenize::{Detokenizer, EmptyStop, StopMatch, StopStrings};
use farthing::load::Tokenizer;
use proptest::prelude::*;
use std::sync::Arc;

fn tokenizers() -> Vec<Arc<Tokenizer>> {
    let fixture = fixture("vocabularies.json");
    let mut byte_level = vocabulary(&fixture["byte_level"]["vocabulary"]);
    byte_level.pre = "smollm".into();
    let pieces =
        fixture["sentence_piece"].as_array().expect("a list").iter().map(|entry| vocabulary(&entry["vocabulary"]));
    let all = pieces.chain([byte_level]);
    all.map(|vocabulary| Arc::new(Tokenizer::from_vocabulary(vocabulary).expect("loads"))).collect()
}

#[test]
fn pieces_join_to_the_decoded_text() {
    let texts: Vec<String> = serde_json::from_value(fixture("vocabularies.json")["texts"].clone()).expect("texts");
    for tokenizer in tokenizers() {
        for text in &texts {
            let ids = tokenizer.encode(text, true);
            let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer));
            let mut joined: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
            joined += &detokenizer.finish();
            assert_eq!(joined, tokenizer.decode(&ids, true));
        }
    }
}

#[test]
fn characters_come_whole() {
    let tokenizer = tokenizers().remove(0);
    let byte = |byte: u8| tokenizer.token_to_id(&format!("<0x{byte:02X}>")).expect("a byte token");
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer));
    let pieces: Vec<String> = "😀é".bytes().map(|it| detokenizer.push(byte(it))).collect();
    assert_eq!(pieces, ["", "", "", "😀", "", "é"]);
    // A lead byte that is not continued, then a stray continuation, then half a character at the end.
    let bytes = [0xE4, 0xBD, b'a', 0x80, 0xFF, 0xF0, 0x9F];
    let mut pieces: Vec<String> = bytes.iter().map(|&it| detokenizer.push(byte(it))).collect();
    pieces.push(detokenizer.finish());
    assert_eq!(pieces, ["", "", "\u{fffd}a", "\u{fffd}", "\u{fffd}", "", "", "\u{fffd}"]);
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn only_the_first_blank_is_dropped() {
    let tokenizer = tokenizers().remove(0);
    let blank = tokenizer.token_to_id("▁").expect("a blank");
    let ids = [1, blank, blank, blank];
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer));
    assert_eq!(ids.map(|id| detokenizer.push(id)), ["", "", " ", " "]);
    assert_eq!(tokenizer.decode(&ids, true), "  ");
}

#[test]
fn many_tokens_cost_no_more_each() {
    // A quadratic detokenizer would take minutes.
    let tokenizer = tokenizers().remove(2);
    let ids = tokenizer.encode("word ", false);
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer));
    let written: usize = (0..2_000_000).map(|i| detokenizer.push(ids[i % ids.len()]).len()).sum();
    assert!(written > 2_000_000);
}

proptest! {
    #[test]
    fn any_ids_join_to_the_decoded_text(ids in proptest::collection::vec(0_u32..800, 0..60)) {
        for tokenizer in tokenizers() {
            let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer));
            let mut joined: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
            joined += &detokenizer.finish();
            prop_assert_eq!(joined, tokenizer.decode(&ids, true));
        }
    }

    /// The answer does not depend on where its pieces are cut, and ends before the stop text that is complete first.
    #[test]
    fn stops_do_not_depend_on_pieces(
        text in "[abé\n]{0,40}",
        stops in proptest::collection::vec("[abé\n]{1,5}", 0..4),
        cuts in proptest::collection::vec(1_usize..6, 40),
    ) {
        let characters: Vec<char> = text.chars().collect();
        let mut matcher = StopStrings::new(&stops).expect("not empty");
        let (mut shown, mut at) = (String::new(), 0);
        for cut in cuts {
            let end = (at + cut).min(characters.len());
            let piece: String = characters[at..end].iter().collect();
            at = end;
            let found = matcher.push(&piece);
            shown += &found.text;
            prop_assert_eq!(found.stopped, matcher.stopped());
        }
        let ends = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|start| (start + stop.len(), start)));
        if let Some((_, start)) = ends.min() {
            prop_assert!(matcher.stopped());
            prop_assert_eq!(&shown, &text[..start]);
            prop_assert_eq!(matcher.matched().map(|found| found.offset), Some(start));
            prop_assert_eq!(matcher.finish(), "");
        } else {
            prop_assert!(!matcher.stopped());
            prop_assert_eq!(shown + &matcher.finish(), text);
        }
    }
}

#[test]
fn stop_texts() {
    let stops = |list: &[&str]| StopStrings::new(&list.iter().map(ToString::to_string).collect::<Vec<_>>());
    assert_eq!(stops(&["a", ""]).err(), Some(EmptyStop { index: 1 }));
    assert_eq!(EmptyStop { index: 1 }.to_string(), "an empty text at position 1");

    let mut none = stops(&[]).expect("no stops");
    assert_eq!(none.push("anything").text, "anything");
    assert_eq!((none.stopped(), none.finish()), (false, String::new()));

    let mut two = stops(&["</answer>", "answer"]).expect("valid");
    assert_eq!(two.push("The </ans").text, "The ");
    let found = two.push("wer> is");
    assert_eq!((found.text.as_str(), found.stopped), ("</", true));
    assert_eq!(two.matched(), Some(StopMatch { index: 1, offset: 6 }), "the stop that is complete first");
    assert_eq!(two.push("more").text, "");

    let mut held = stops(&["aab"]).expect("valid");
    assert_eq!(held.push("aaa").text, "a", "only what may still become a stop is held back");
    assert_eq!(held.push("c").text, "aac");
    assert_eq!(held.push("aa").text, "");
    assert_eq!(held.finish(), "aa");
}
