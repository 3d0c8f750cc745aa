//! Where states live: one slot for each sequence.

use std::ops::Range;

use crate::memory::{AlignedBytes, OutOfMemory};
use crate::pool::Disjoint;
use crate::vector::LANES;

/// One sequence's rows in a step, and the slot of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index of its first row in the step.
    pub first_row: usize,
    /// Number of its rows.
    pub rows: usize,
    /// Slot of its state.
    pub slot: usize,
}

impl Segment {
    /// Its rows in the step.
    pub(super) fn range(&self) -> Range<usize> {
        self.first_row..self.first_row + self.rows
    }
}

/// States of one layer, `floats` floats for each of a number of slots; memory is touched where slots are used.
///
/// ```
/// use farthing_kernels::recurrent::States;
/// let mut states = States::new(4, 10)?;
/// states.slot_mut(3)[9] = 1.0;
/// assert_eq!((states.slot(3)[9], states.slot(2)[9]), (1.0, 0.0));
/// # Ok::<(), farthing_kernels::memory::OutOfMemory>(())
/// ```
#[derive(Debug)]
pub struct States {
    bytes: AlignedBytes,
    slots: usize,
    floats: usize,
    /// Floats from one slot to the next: whole cache lines.
    stride: usize,
}

impl States {
    /// `slots` states of zeros.
    ///
    /// # Errors
    /// [`OutOfMemory`] when the system refuses the memory.
    pub fn new(slots: usize, floats: usize) -> Result<States, OutOfMemory> {
        let refused = OutOfMemory { bytes: usize::MAX };
        let stride = floats.checked_next_multiple_of(LANES).ok_or(refused.clone())?;
        let length = stride.checked_mul(4).and_then(|bytes| bytes.checked_mul(slots)).ok_or(refused)?;
        Ok(States { bytes: AlignedBytes::zeroed(length)?, slots, floats, stride })
    }

    /// Floats of a state.
    pub fn floats(&self) -> usize {
        self.floats
    }

    /// One state.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn slot(&self, slot: usize) -> &[f32] {
        let floats: &[f32] = bytemuck::cast_slice(&self.bytes);
        &floats[slot * self.stride..][..self.floats]
    }

    /// One state, to be written.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn slot_mut(&mut self, slot: usize) -> &mut [f32] {
        let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut self.bytes);
        &mut floats[slot * self.stride..][..self.floats]
    }

    /// The states of `segments`, each at floats `part` of its slot, for the threads of a region.
    ///
    /// # Panics
    /// When a slot is missing, shared by two segments, or smaller than `part`, or when rows go beyond `rows`.
    pub(super) fn share(&mut self, segments: &[Segment], part: Range<usize>, rows: usize) -> Shared<'_> {
        assert!(part.start <= part.end && part.end <= self.floats, "floats {part:?} of a state of {}", self.floats);
        let mut slots: Vec<usize> = segments.iter().map(|segment| segment.slot).collect();
        slots.sort_unstable();
        assert!(slots.windows(2).all(|pair| pair[0] != pair[1]), "two segments have one state");
        assert!(slots.last().is_none_or(|&slot| slot < self.slots), "slots {slots:?} of {}", self.slots);
        assert!(segments.windows(2).all(|pair| pair[0].range().end <= pair[1].first_row), "segments overlap");
        assert!(segments.last().is_none_or(|last| last.range().end <= rows), "segments of {rows} rows");
        Shared { floats: Disjoint::new(bytemuck::cast_slice_mut(&mut self.bytes)), stride: self.stride, part }
    }
}

/// One part of every state, shared by the threads of a region.
#[derive(Clone)]
pub(super) struct Shared<'a> {
    floats: Disjoint<'a, f32>,
    stride: usize,
    part: Range<usize>,
}

impl<'a> Shared<'a> {
    /// Floats `range` of the part in `slot`.
    ///
    /// # Safety
    /// No other call may reach any of them at the same time.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn slice(&self, slot: usize, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.end <= self.part.len(), "{range:?} of {:?}", self.part);
        let start = slot * self.stride + self.part.start;
        // SAFETY: the caller's promise; slots don't overlap, since a stride is no shorter than a state.
        unsafe { self.floats.slice(start + range.start..start + range.end) }
    }
}
