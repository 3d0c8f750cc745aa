//! Which experts are in memory: those that are needed now, those that were used last, and a few that may come next.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::file::Store;
use super::layout::{Layout, pieces};
use crate::checksum::checksum;
use crate::error::Error;
use crate::ledger::ExpertCounts;
use farthing_kernels::file_map::FileMap;

/// Threads that read; more do not make a disk faster.
const READERS: usize = 4;
/// This part of the budget is kept free, so that reads need not wait for evictions.
const SPARE: usize = 32;

/// A memory of at most `budget` bytes of a store's experts, and the threads that fill it.
#[derive(Debug)]
pub(crate) struct Residency {
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    map: Arc<FileMap>,
    path: PathBuf,
    experts: Vec<Expert>,
    budget: usize,
    /// Left free where possible.
    spare: usize,
    state: Mutex<State>,
    /// There is something to read.
    work: Condvar,
    /// Something has been read or has left.
    done: Condvar,
}

/// An expert's place in the file.
#[derive(Debug)]
struct Expert {
    range: Range<usize>,
    /// Of each piece.
    sums: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    Absent,
    /// So many pieces are still to come.
    Coming(usize),
    Here,
    /// Waits to leave, and may yet stay.
    Leaving,
    /// Is being dropped.
    Dropped,
}

#[derive(Clone, Debug)]
struct Slot {
    presence: Presence,
    /// Uses under way; such an expert stays.
    pins: u32,
    /// Its place in the order of last use.
    stamp: u64,
    /// Came by a guess and has not been used.
    guessed: bool,
    /// Its checksums have been compared.
    verified: bool,
}

#[derive(Clone, Copy, Debug)]
struct Fetch {
    expert: usize,
    piece: usize,
}

#[derive(Debug, Default)]
struct State {
    slots: Vec<Slot>,
    /// Experts that may leave, by last use.
    order: BTreeMap<u64, usize>,
    clock: u64,
    /// Bytes of experts that are here or coming.
    promised: usize,
    /// Bytes that may be in memory: fetched or being fetched, and not yet dropped.
    present: usize,
    urgent: VecDeque<Fetch>,
    guessed: VecDeque<Fetch>,
    leaving: VecDeque<usize>,
    counts: ExpertCounts,
    fault: Option<String>,
    closing: bool,
}

/// What a reader does next.
enum Job {
    Fetch(Fetch),
    Drop(usize),
}

impl Residency {
    /// An empty memory. `budget` holds the experts of one token of any layer.
    pub(crate) fn new(store: &Store, layout: &Layout, budget: u64) -> Result<Residency, Error> {
        let mut sums = store.sums.iter().copied();
        let mut expert = |range: Range<usize>| {
            let count = pieces(&range).count();
            Expert { range, sums: sums.by_ref().take(count).collect() }
        };
        let experts: Vec<Expert> = layout.experts().map(&mut expert).collect();
        let budget = usize::try_from(budget).unwrap_or(usize::MAX);
        let largest = experts.iter().map(|expert| expert.range.len()).max().unwrap_or(0);
        let spare = if budget / SPARE < largest { 0 } else { budget / SPARE };
        let empty = Slot { presence: Presence::Absent, pins: 0, stamp: 0, guessed: false, verified: false };
        let state = State { slots: vec![empty; experts.len()], ..State::default() };
        let shared = Arc::new(Shared {
            map: Arc::clone(&store.map),
            path: store.path.clone(),
            experts,
            budget,
            spare,
            state: Mutex::new(state),
            work: Condvar::new(),
            done: Condvar::new(),
        });
        // What packing or another process has left in the system's cache is not ours.
        shared.map.release(0..shared.map.len());
        let mut residency = Residency { shared, readers: Vec::with_capacity(READERS) };
        for reader in 0..READERS {
            let shared = Arc::clone(&residency.shared);
            let spawned = std::thread::Builder::new()
                .name(format!("farthing-reader-{reader}"))
                .spawn(move || shared.serve())
                .map_err(|error| Error::Stopped { reason: format!("no threads to read experts with: {error}") })?;
            residency.readers.push(spawned);
        }
        Ok(residency)
    }

    /// Most bytes of experts in memory.
    pub(crate) fn budget(&self) -> usize {
        self.shared.budget
    }

    /// Counts so far.
    pub(crate) fn counts(&self) -> ExpertCounts {
        self.shared.lock().counts
    }

    /// Which of `experts` are here, coming, or not gone yet.
    pub(crate) fn resident(&self, experts: Range<usize>, out: &mut Vec<bool>) {
        let state = self.shared.lock();
        out.clear();
        let gone = |slot: &Slot| matches!(slot.presence, Presence::Absent | Presence::Dropped);
        out.extend(state.slots[experts].iter().map(|slot| !gone(slot)));
    }

    /// Pins `experts`, distinct ones that the budget holds beside all others that are pinned, and has them fetched.
    pub(crate) fn demand(&self, experts: &[usize]) {
        let (shared, mut need) = (&self.shared, 0);
        let mut state = shared.lock();
        let mut missing = Vec::new();
        for &expert in experts {
            while state.slots[expert].presence == Presence::Dropped {
                state = shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let length = shared.experts[expert].range.len();
            let state = &mut *state;
            let slot = &mut state.slots[expert];
            slot.pins += 1;
            if std::mem::take(&mut slot.guessed) {
                state.counts.right_guesses += 1;
            }
            match slot.presence {
                Presence::Here => {
                    state.order.remove(&slot.stamp);
                }
                Presence::Leaving => {
                    slot.presence = Presence::Here;
                    state.leaving.retain(|&leaving| leaving != expert);
                    need += length;
                }
                Presence::Coming(_) => {
                    let (mine, rest) = state.guessed.iter().partition::<VecDeque<_>, _>(|job| job.expert == expert);
                    state.urgent.extend(mine);
                    state.guessed = rest;
                    state.counts.misses += 1;
                    continue;
                }
                Presence::Absent | Presence::Dropped => {
                    missing.push(expert);
                    need += length;
                    state.counts.misses += 1;
                    continue;
                }
            }
            state.counts.hits += 1;
        }
        shared.forget_guesses(&mut state);
        while !shared.make_room(&mut state, need) && state.fault.is_none() {
            // Guesses that are on their way can leave when they have come.
            state = shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        shared.make_room(&mut state, need + shared.spare);
        state.promised += need;
        for expert in missing {
            let count = shared.experts[expert].sums.len();
            state.slots[expert].presence = Presence::Coming(count);
            state.urgent.extend((0..count).map(|piece| Fetch { expert, piece }));
        }
        drop(state);
        shared.work.notify_all();
    }

    /// Waits until `experts`, which were demanded, are here.
    pub(crate) fn wait(&self, experts: &[usize]) -> Result<(), Error> {
        let mut state = self.shared.lock();
        loop {
            if let Some(fault) = &state.fault {
                return Err(Error::Store { file: self.shared.path.display().to_string(), reason: fault.clone() });
            }
            if experts.iter().all(|&expert| state.slots[expert].presence == Presence::Here) {
                return Ok(());
            }
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives `experts`, which were demanded, free to leave.
    pub(crate) fn release(&self, experts: &[usize]) {
        let mut state = self.shared.lock();
        for &expert in experts {
            state.slots[expert].pins -= 1;
            state.used(expert);
        }
    }

    /// Has an expert fetched when there is nothing better to do.
    pub(crate) fn guess(&self, expert: usize) {
        let (shared, mut state) = (&self.shared, self.shared.lock());
        let length = shared.experts[expert].range.len();
        if state.slots[expert].presence != Presence::Absent || !shared.make_room(&mut state, length) {
            return;
        }
        state.promised += length;
        state.counts.guesses += 1;
        let count = shared.experts[expert].sums.len();
        state.slots[expert].presence = Presence::Coming(count);
        state.slots[expert].guessed = true;
        state.guessed.extend((0..count).map(|piece| Fetch { expert, piece }));
        drop(state);
        shared.work.notify_all();
    }
}

impl Drop for Residency {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        for reader in self.readers.drain(..) {
            // A reader that panicked has nothing left to do.
            let _ = reader.join();
        }
    }
}

impl State {
    /// Puts an expert that is here and free to leave behind all others.
    fn used(&mut self, expert: usize) {
        let slot = &mut self.slots[expert];
        if slot.pins == 0 && slot.presence == Presence::Here {
            self.clock += 1;
            slot.stamp = self.clock;
            self.order.insert(self.clock, expert);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends experts away until `bytes` more can be promised; whether they can.
    fn make_room(&self, state: &mut State, bytes: usize) -> bool {
        while state.promised + bytes > self.budget {
            let Some((_, expert)) = state.order.pop_first() else { return false };
            state.slots[expert].presence = Presence::Leaving;
            state.promised -= self.experts[expert].range.len();
            state.leaving.push_back(expert);
        }
        true
    }

    /// Forgets the guesses that nobody has begun to fetch: the layer that they were for has come.
    fn forget_guesses(&self, state: &mut State) {
        while let Some(Fetch { expert, .. }) = state.guessed.front().copied() {
            let pieces = state.guessed.iter().take_while(|job| job.expert == expert).count();
            if pieces < self.experts[expert].sums.len() {
                // It is half here.
                let begun: Vec<Fetch> = state.guessed.drain(..pieces).collect();
                state.urgent.extend(begun);
                continue;
            }
            state.guessed.drain(..pieces);
            let slot = &mut state.slots[expert];
            (slot.presence, slot.guessed) = (Presence::Absent, false);
            state.promised -= self.experts[expert].range.len();
            state.counts.guesses -= 1;
        }
    }

    /// What to do now: reads that fit, those that are waited for first, before anything leaves.
    fn next(&self, state: &mut State) -> Option<Job> {
        let length = |job: &Fetch| self.piece(job).len();
        if let Some(job) = state.urgent.front().copied()
            && state.present + length(&job) <= self.budget
        {
            state.urgent.pop_front();
            state.present += length(&job);
            return Some(Job::Fetch(job));
        }
        if let Some(expert) = state.leaving.pop_front() {
            state.slots[expert].presence = Presence::Dropped;
            return Some(Job::Drop(expert));
        }
        if let Some(job) = state.guessed.front().copied()
            && state.urgent.is_empty()
            && state.present + length(&job) <= self.budget
        {
            state.guessed.pop_front();
            state.present += length(&job);
            return Some(Job::Fetch(job));
        }
        None
    }

    fn piece(&self, job: &Fetch) -> Range<usize> {
        pieces(&self.experts[job.expert].range).nth(job.piece).unwrap_or_default()
    }

    /// A reader's life.
    fn serve(&self) {
        let mut state = self.lock();
        while !state.closing {
            let Some(job) = self.next(&mut state) else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state = match job {
                Job::Fetch(job) => self.fetch(state, job),
                Job::Drop(expert) => {
                    drop(state);
                    let range = self.experts[expert].range.clone();
                    self.map.release(range.clone());
                    let mut state = self.lock();
                    state.present -= range.len();
                    state.slots[expert].presence = Presence::Absent;
                    state.slots[expert].guessed = false;
                    state.counts.evictions += 1;
                    self.work.notify_all();
                    state
                }
            };
            self.done.notify_all();
        }
    }

    fn fetch<'a>(&'a self, state: MutexGuard<'a, State>, job: Fetch) -> MutexGuard<'a, State> {
        let (range, verified) = (self.piece(&job), state.slots[job.expert].verified);
        drop(state);
        let fetched = match self.map.fetch(range.clone()) {
            Err(error) => Err(error.to_string()),
            // Once for each piece and process: the disk is trusted to give the same bytes again.
            Ok(()) if !verified && checksum(&self.map[range.clone()]) != self.experts[job.expert].sums[job.piece] => {
                // So that the next load packs anew.
                let _ = std::fs::remove_file(&self.path);
                Err(format!("bytes {} to {} are damaged; the file has been removed", range.start, range.end))
            }
            Ok(()) => Ok(()),
        };
        let mut state = self.lock();
        if let Err(fault) = fetched {
            state.fault.get_or_insert(fault);
            return state;
        }
        state.counts.bytes += range.len() as u64;
        if let Presence::Coming(left) = state.slots[job.expert].presence {
            let slot = &mut state.slots[job.expert];
            slot.presence = if left > 1 { Presence::Coming(left - 1) } else { Presence::Here };
            slot.verified |= left == 1;
            state.used(job.expert);
        }
        state
    }
}
