//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::HashMap;
use std::fmt::{self, Formatter};

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::checkpoint::Tensor;
use super::error::IndexError;
use super::json::{LONGEST_STRING, survey};

const LARGEST: u64 = 32 << 20;
const MOST_TENSORS: usize = 1 << 19;
const MOST_SHARDS: usize = 1 << 12;

/// The parsed index.
pub(super) struct Index {
    /// File names, in the order of their first mention.
    pub(super) shards: Vec<String>,
    /// Tensors and the positions of their shards, sorted by name.
    map: Vec<(Box<str>, u32)>,
}

/// Parses the index file's bytes.
pub(super) fn parse(bytes: &[u8]) -> Result<Index, IndexError> {
    let got = bytes.len() as u64;
    if got > LARGEST {
        return Err(IndexError::Size { unit: "bytes", got, expected: LARGEST });
    }
    let longest = survey(bytes).longest_string;
    if longest > LONGEST_STRING {
        return Err(IndexError::Size { unit: "bytes of a string", got: longest, expected: LONGEST_STRING });
    }
    let file: File = serde_json::from_slice(bytes).map_err(|error| IndexError::Json { got: error.to_string() })?;
    let Entries { mut map, tensors, shards } = file.weight_map;
    if tensors > MOST_TENSORS {
        return Err(IndexError::Size { unit: "tensors", got: tensors as u64, expected: MOST_TENSORS as u64 });
    }
    if shards.len() > MOST_SHARDS {
        return Err(IndexError::Size { unit: "shards", got: shards.len() as u64, expected: MOST_SHARDS as u64 });
    }
    if let Some(got) = shards.iter().find(|shard| !is_plain_name(shard)) {
        return Err(IndexError::ShardName { got: got.chars().take(256).collect() });
    }
    map.sort();
    if let Some(pair) = map.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(IndexError::Duplicate { tensor: pair[0].0.to_string() });
    }
    Ok(Index { shards, map })
}

/// Whether the name stays in its directory on every system.
fn is_plain_name(name: &str) -> bool {
    let stem = name.strip_suffix(".safetensors").unwrap_or_default();
    !stem.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':', '\0'])
}

impl Index {
    /// Checks that the shards, which are files in the index's order, hold the mapped tensors and no others.
    pub(super) fn check(&self, tensors: &[Tensor]) -> Result<(), IndexError> {
        let shard = |position: u32| self.shards[position as usize].clone();
        let mut found = vec![false; self.map.len()];
        for tensor in tensors {
            let expected = match self.map.binary_search_by(|(name, _)| name.cmp(&tensor.name)) {
                Ok(at) if self.map[at].1 == tensor.file => {
                    found[at] = true;
                    continue;
                }
                Ok(at) => shard(self.map[at].1),
                Err(_) => "no shard, as weight_map does not name it".to_string(),
            };
            return Err(IndexError::Misplaced { tensor: tensor.name.to_string(), got: shard(tensor.file), expected });
        }
        match found.iter().zip(&self.map).find(|(found, _)| !**found) {
            None => Ok(()),
            Some((_, (name, position))) => Err(IndexError::Misplaced {
                tensor: name.to_string(),
                got: "no such tensor there".to_string(),
                expected: shard(*position),
            }),
        }
    }
}

#[derive(serde::Deserialize)]
struct File {
    weight_map: Entries,
    /// Total sizes, which real files often have wrong.
    #[serde(rename = "metadata")]
    _metadata: Option<IgnoredAny>,
}

/// `weight_map`; past a limit, entries are counted but not kept.
#[derive(Default)]
struct Entries {
    map: Vec<(Box<str>, u32)>,
    tensors: usize,
    shards: Vec<String>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Entries;
            fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
                f.write_str("an object of shard names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let (mut entries, mut positions) = (Entries::default(), HashMap::new());
                while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
                    entries.tensors += 1;
                    if entries.tensors > MOST_TENSORS || entries.shards.len() > MOST_SHARDS {
                        continue;
                    }
                    let position = *positions.entry(shard.clone()).or_insert_with(|| {
                        entries.shards.push(shard);
                        entries.shards.len() as u32 - 1
                    });
                    entries.map.push((tensor.into(), position));
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Map)
    }
}
