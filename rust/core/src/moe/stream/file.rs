//! The store's file: believed only whole, replaced whole, and left alone by whoever is killed.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::layout::{Layout, pieces};
use crate::checksum::checksum;
use crate::error::Error;
use farthing_kernels::cost::cache_directory;
use farthing_kernels::file_map::{FileMap, drop_cached};

const UNFINISHED: &str = "unfinished";

/// An expert store that was found good.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) map: Arc<FileMap>,
    pub(super) path: PathBuf,
    /// Of each piece of each expert.
    pub(super) sums: Vec<u64>,
}

/// Where the store of the model at `model`, packed as `how` says, lies: one file for both, so that a newer one takes the
/// place of an older.
pub(crate) fn store_path(model: &Path, how: &str) -> Result<PathBuf, Error> {
    let directory = cache_directory().ok_or_else(|| {
        Error::unsupported("expert_memory without a cache directory", "set XDG_CACHE_HOME or HOME to an absolute path")
    })?;
    let whole = fs::canonicalize(model).unwrap_or_else(|_| model.to_path_buf());
    let stem = whole.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let key = checksum(format!("{} {how}", whole.display()).as_bytes());
    Ok(directory.join("experts").join(format!("{stem}-{key:016x}")))
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::Store { file: path.display().to_string(), reason: error.to_string() }
}

impl Store {
    /// The store at `path`, if it is one of `layout`, whole and with an undamaged header.
    pub(crate) fn open(path: &Path, layout: &Layout) -> Option<Store> {
        if !fs::metadata(path).ok()?.is_file() {
            return None;
        }
        let mut file = File::open(path).ok()?;
        if file.metadata().ok()?.len() != layout.length() as u64 {
            return None;
        }
        let mut header = vec![0; layout.header_length()];
        file.read_exact(&mut header).ok()?;
        let sums = layout.read(&header)?;
        let map = FileMap::new(file).ok().filter(|map| map.len() == layout.length())?;
        Some(Store { map: Arc::new(map), path: path.to_path_buf(), sums })
    }
}

/// A store that is being packed. It takes its name when it is complete; one that is dropped before leaves nothing.
pub(crate) struct Writer {
    file: File,
    path: PathBuf,
    unfinished: PathBuf,
    sums: Vec<u64>,
    /// Bytes before this one are on disk.
    settled: u64,
}

impl Writer {
    /// Begins the store at `path`, and removes what killed processes have left there.
    pub(crate) fn create(path: &Path, layout: &Layout) -> Result<Writer, Error> {
        let begin = || {
            let directory = path.parent().unwrap_or(Path::new("."));
            fs::create_dir_all(directory)?;
            sweep(directory)?;
            let (mut file, unfinished) = locked(path)?;
            file.seek(SeekFrom::Start(layout.header_length() as u64))?;
            Ok((file, unfinished))
        };
        let (file, unfinished) = begin().map_err(|error| failed(path, &error))?;
        let settled = layout.header_length() as u64;
        Ok(Writer { file, path: path.to_path_buf(), unfinished, sums: Vec::new(), settled })
    }

    /// Appends the next expert of the layout, whose matrices lie one after the other.
    pub(crate) fn push(&mut self, matrices: &[&[u8]]) -> Result<(), Error> {
        const MATRIX: usize = 64;
        const EXPERT: usize = 4096;
        let mut bytes = Vec::with_capacity(matrices.iter().map(|matrix| matrix.len() + MATRIX).sum::<usize>() + EXPERT);
        for matrix in matrices {
            bytes.resize(bytes.len().next_multiple_of(MATRIX), 0);
            bytes.extend_from_slice(matrix);
        }
        self.sums.extend(pieces(&(0..bytes.len())).map(|piece| checksum(&bytes[piece])));
        bytes.resize(bytes.len().next_multiple_of(EXPERT), 0);
        self.file.write_all(&bytes).map_err(|error| failed(&self.path, &error))
    }

    /// Writes what there is to disk and takes it out of memory.
    pub(crate) fn settle(&mut self) -> Result<(), Error> {
        let mut settle = || {
            self.file.sync_data()?;
            let end = self.file.stream_position()?;
            drop_cached(&self.file, self.settled as usize..end as usize);
            self.settled = end;
            Ok(())
        };
        settle().map_err(|error| failed(&self.path, &error))
    }

    /// Writes the header and gives the store its name.
    pub(crate) fn finish(mut self, layout: &Layout) -> Result<(), Error> {
        assert_eq!(self.file.stream_position().ok(), Some(layout.length() as u64), "experts of the layout");
        let mut finish = || {
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&layout.write(&self.sums))?;
            self.file.sync_all()?;
            fs::rename(&self.unfinished, &self.path)?;
            // So that the name survives a loss of power too; not every system opens directories.
            self.path.parent().map_or(Ok(()), |directory| File::open(directory).map_or(Ok(()), |it| it.sync_all()))
        };
        finish().map_err(|error| failed(&self.path, &error))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Gone already where it was renamed.
        let _ = fs::remove_file(&self.unfinished);
    }
}

/// A new file beside `path`, locked as long as this process lives: that tells the others that someone is at work.
fn locked(path: &Path) -> io::Result<(File, PathBuf)> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    loop {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let unfinished = path.with_added_extension(format!("{}-{number}.{UNFINISHED}", std::process::id()));
        let file = File::create(&unfinished)?;
        file.lock()?;
        // Another process may have swept it away before the lock was there.
        if unfinished.exists() {
            return Ok((file, unfinished));
        }
    }
}

/// Removes the stores that nobody finishes any more.
fn sweep(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == UNFINISHED)
            && File::open(&path).is_ok_and(|file| file.try_lock().is_ok())
        {
            // Someone else may have done so.
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}
