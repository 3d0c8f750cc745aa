use std::fs;
use std::path::PathBuf;

use super::file::{Store, Writer};
use super::layout::{Layout, pieces};
use super::residency::Residency;
use crate::error::Error;
use crate::model::feed_forward::levers::{LayerShape, MatrixShape};
use farthing_kernels::format::{Bits, FloatType, Format, Offset, PackedMatrix, Precision};

/// A directory that is gone when it is dropped.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("farthing-experts-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    fn store(&self) -> PathBuf {
        self.0.join("store")
    }

    fn files(&self) -> usize {
        fs::read_dir(&self.0).unwrap().count()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const INT8: Format = Format::Integer { bits: Bits::Eight, group: 32, offset: Offset::Symmetric, scale: FloatType::F16 };

/// Layers of 5 and 7 experts; those of the second are three pieces each.
fn layout(identity: &str) -> Layout {
    let matrix = |n, k, format, precision| MatrixShape { n, k, format, precision };
    let small =
        vec![matrix(40, 33, Format::Float(FloatType::F32), Precision::F32), matrix(33, 40, INT8, Precision::A8)];
    let large = vec![matrix(2100, 2048, INT8, Precision::A16)];
    let layer = |layer, experts, matrices| LayerShape { layer, experts, top_k: 2, source: "tests".into(), matrices };
    Layout::new(identity, vec![layer(1, 5, small), layer(4, 7, large)]).unwrap()
}

fn experts() -> impl Iterator<Item = (usize, usize, usize)> {
    [(1, 5), (4, 7)]
        .into_iter()
        .flat_map(|(layer, count)| (0..count).map(move |expert| (layer, expert)))
        .enumerate()
        .map(|(number, (layer, expert))| (number, layer, expert))
}

fn matrices(layout: &Layout, layer: usize, expert: usize) -> Vec<PackedMatrix> {
    let shapes = layout.matrices(layer, expert).map(|(shape, _)| shape);
    shapes
        .zip(0..)
        .map(|(shape, at)| {
            let MatrixShape { n, k, format, precision } = shape;
            PackedMatrix::random(n, k, format, precision, (layer * 100 + expert * 10 + at) as u64).unwrap()
        })
        .collect()
}

fn pack(directory: &Directory, layout: &Layout) -> Store {
    let mut writer = Writer::create(&directory.store(), layout).unwrap();
    for (_, layer, expert) in experts() {
        let matrices = matrices(layout, layer, expert);
        writer.push(&matrices.iter().map(PackedMatrix::as_bytes).collect::<Vec<_>>()).unwrap();
    }
    writer.settle().unwrap();
    writer.finish(layout).unwrap();
    Store::open(&directory.store(), layout).unwrap()
}

#[test]
fn what_was_packed_is_mapped() {
    let (directory, layout) = (Directory::new("mapped"), layout("a model\n"));
    let store = pack(&directory, &layout);
    assert_eq!(directory.files(), 1);
    for (_, layer, expert) in experts() {
        for ((shape, range), expected) in layout.matrices(layer, expert).zip(matrices(&layout, layer, expert)) {
            let part = store.map.part(range).unwrap();
            let mapped = PackedMatrix::mapped(shape.n, shape.k, shape.format, shape.precision, part).unwrap();
            assert_eq!(mapped.as_bytes(), expected.as_bytes());
            assert_eq!(mapped.dequantize(), expected.dequantize());
        }
    }
    assert_eq!(layout.largest_token(), (2 * layout.layer(4).unwrap().1, 4));
}

#[test]
fn nothing_but_this_very_store_is_believed() {
    let (directory, layout) = (Directory::new("believed"), layout("a model\n"));
    let path = directory.store();
    assert!(Store::open(&path, &layout).is_none(), "no file");
    drop(pack(&directory, &layout));
    let good = fs::read(&path).unwrap();
    assert!(Store::open(&path, &self::layout("another model\n")).is_none(), "another model");
    for bit in (0..8 * layout.header_length()).step_by(1009) {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bytes).unwrap();
        assert!(Store::open(&path, &layout).is_none(), "bit {bit}");
    }
    for length in [0, 1, 15, 4095, layout.header_length(), good.len() - 1] {
        fs::write(&path, &good[..length]).unwrap();
        assert!(Store::open(&path, &layout).is_none(), "the first {length} bytes");
    }
    fs::write(&path, [&good[..], &[0]].concat()).unwrap();
    assert!(Store::open(&path, &layout).is_none(), "a byte more");
    fs::write(&path, vec![b'x'; good.len()]).unwrap();
    assert!(Store::open(&path, &layout).is_none(), "a foreign file");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(Store::open(&path, &layout).is_none(), "a directory");
}

#[test]
fn whoever_stops_early_leaves_nothing() {
    let (directory, layout) = (Directory::new("stopped"), layout("a model\n"));
    // Of a process that is gone: nobody holds its lock.
    let orphan = directory.0.join("store.1-0.unfinished");
    fs::write(&orphan, "half").unwrap();
    let mut writer = Writer::create(&directory.store(), &layout).unwrap();
    assert!(!orphan.exists());
    writer.push(&[&[1; 100]]).unwrap();
    let other = Writer::create(&directory.store(), &layout).unwrap();
    assert_eq!(directory.files(), 2, "both are at work");
    drop((writer, other));
    assert_eq!(directory.files(), 0);
}

#[test]
fn a_damaged_expert_is_an_error_and_its_store_is_removed() {
    let (directory, layout) = (Directory::new("damaged"), layout("a model\n"));
    drop(pack(&directory, &layout));
    let mut bytes = fs::read(directory.store()).unwrap();
    let at = layout.experts().nth(6).unwrap().end - 1;
    bytes[at] ^= 1;
    fs::write(directory.store(), &bytes).unwrap();
    let store = Store::open(&directory.store(), &layout).unwrap();
    let residency = Residency::new(&store, &layout, layout.expert_bytes()).unwrap();
    residency.demand(&[0, 5]);
    residency.wait(&[0, 5]).unwrap();
    residency.demand(&[6]);
    let error = residency.wait(&[6]).unwrap_err();
    assert!(matches!(&error, Error::Store { reason, .. } if reason.contains("damaged")), "{error}");
    assert_eq!(directory.files(), 0);
}

#[test]
fn eight_threads_find_the_bytes_they_ask_for_within_the_budget() {
    let (directory, layout) = (Directory::new("stress"), layout("a model\n"));
    let store = pack(&directory, &layout);
    let ranges: Vec<_> = layout.experts().collect();
    let sums: Vec<Vec<u64>> = ranges
        .iter()
        .map(|range| pieces(range).map(|piece| crate::checksum::checksum(&store.map[piece])).collect())
        .collect();
    // One large expert for each thread cannot be: at most four of them are asked for at once.
    let budget = 4 * ranges[11].len() + 8 * ranges[0].len();
    let residency = Residency::new(&store, &layout, budget as u64).unwrap();
    let turns = std::sync::Mutex::new(());
    std::thread::scope(|scope| {
        for thread in 0..8_usize {
            let (residency, store, ranges, sums, turns) = (&residency, &store, &ranges, &sums, &turns);
            scope.spawn(move || {
                for round in 0..40_usize {
                    // Half of the threads ask for large experts.
                    let expert = if thread < 4 { 5 + (thread + round * 3) % 7 } else { (thread + round) % 5 };
                    if round % 3 == 0 {
                        residency.guess((thread + 5 * round) % 12);
                    }
                    // Pins and promises are made for one asker at a time, as the engine is.
                    let asking = turns.lock().unwrap();
                    residency.demand(&[expert]);
                    drop(asking);
                    residency.wait(&[expert]).unwrap();
                    let found: Vec<u64> =
                        pieces(&ranges[expert]).map(|piece| crate::checksum::checksum(&store.map[piece])).collect();
                    assert_eq!(found, sums[expert]);
                    residency.release(&[expert]);
                }
            });
        }
    });
    let counts = residency.counts();
    assert_eq!(counts.hits + counts.misses, 8 * 40);
    assert!(counts.evictions > 10 && counts.right_guesses <= counts.guesses, "{counts:?}");
    assert!(counts.misses >= 12 && counts.bytes > budget as u64, "{counts:?}");
}

#[test]
fn the_least_recently_used_leave() {
    let (directory, layout) = (Directory::new("order"), layout("a model\n"));
    let store = pack(&directory, &layout);
    let large = layout.layer(4).unwrap().1;
    let residency = Residency::new(&store, &layout, 3 * large as u64).unwrap();
    let mut use_one = |expert: usize| {
        let before = residency.counts().misses;
        residency.demand(&[expert]);
        residency.wait(&[expert]).unwrap();
        residency.release(&[expert]);
        residency.counts().misses > before
    };
    let missed: Vec<bool> = [5, 6, 7, 5, 8, 5, 7, 6].map(&mut use_one).to_vec();
    assert_eq!(missed, [true, true, true, false, true, false, false, true]);
    // Dropped pages may be gathered with a delay, but no more than the budget comes in; a page at each end is shared.
    let resident = store.map.resident_bytes();
    assert!(resident <= 4 * large, "{resident} of {large}");
}
