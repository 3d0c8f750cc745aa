//! What one rendering may spend. A template is code from a stranger: every value it makes and every byte it looks at is
//! counted, so that it ends soon and stays small whatever it says. The counts do not depend on the machine.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};
use std::cell::RefCell;

/// Instructions of the virtual machine, besides four for each byte of input.
const STEPS: u64 = 1_000_000;
/// Lists, maps and other containers made; also bounds how deep they can be nested.
const CONTAINERS: u64 = 20_000;
/// Bytes of the strings and containers made, besides eight times the input.
const BYTES: u64 = 24 << 20;
/// Bytes looked at, besides 64 times the input.
const WORK: u64 = 128 << 20;
/// Levels of containers in one another.
pub(super) const DEPTH: u32 = 128;
/// What a value takes in a container.
const SLOT: u64 = 32;
/// What it costs to look at a value, as bytes of a string.
const LOOK: u64 = 64;

/// A limit that a rendering reached.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("more than {limit} {what}")]
pub(super) struct Exceeded {
    pub(super) what: &'static str,
    pub(super) limit: u64,
}

#[derive(Clone, Copy)]
struct Account {
    what: &'static str,
    left: u64,
    limit: u64,
}

impl Account {
    const fn new(what: &'static str, limit: u64) -> Self {
        Self { what, left: limit, limit }
    }

    fn take(&mut self, amount: u64) -> Result<(), Error> {
        match self.left.checked_sub(amount) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(exceeded(self.what, self.limit)),
        }
    }
}

struct Budget {
    containers: Account,
    bytes: Account,
    work: Account,
}

thread_local! {
    /// The budget of the rendering that runs in this thread.
    static BUDGET: RefCell<Budget> = const {
        RefCell::new(Budget {
            containers: Account::new("containers", 0),
            bytes: Account::new("bytes of values", 0),
            work: Account::new("bytes of values to look at", 0),
        })
    };
}

/// Starts a rendering whose messages and other variables have `input` bytes.
pub(super) fn start(input: u64) {
    BUDGET.with_borrow_mut(|budget| {
        budget.containers = Account::new("containers", CONTAINERS + input / 64);
        budget.bytes = Account::new("bytes of values", BYTES.saturating_add(input.saturating_mul(8)));
        budget.work = Account::new("bytes of values to look at", WORK.saturating_add(input.saturating_mul(64)));
    });
}

/// The steps of a rendering whose variables have `input` bytes.
pub(super) fn steps(input: u64) -> u64 {
    STEPS.saturating_add(input.saturating_mul(4))
}

pub(super) fn exceeded(what: &'static str, limit: u64) -> Error {
    let exceeded = Exceeded { what, limit };
    Error::new(ErrorKind::InvalidOperation, exceeded.to_string()).with_source(exceeded)
}

/// Bytes that will be made.
pub(super) fn make(bytes: u64) -> Result<(), Error> {
    BUDGET.with_borrow_mut(|budget| budget.bytes.take(bytes))
}

/// A container that will be made, with `len` values.
pub(super) fn make_container(len: u64) -> Result<(), Error> {
    BUDGET.with_borrow_mut(|budget| {
        budget.containers.take(1)?;
        budget.bytes.take(len.saturating_mul(SLOT))
    })
}

/// One value that will be looked at.
pub(super) fn look_at_one() -> Result<(), Error> {
    look(LOOK)
}

/// Bytes that will be looked at.
fn look(bytes: u64) -> Result<(), Error> {
    BUDGET.with_borrow_mut(|budget| budget.work.take(bytes))
}

/// A value that was just made.
pub(super) fn made(value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => make(text.len() as u64),
        // A lazy sequence has no items yet.
        None if value.kind() == ValueKind::Iterable => make_container(0),
        None if value.as_object().is_some() => make_container(value.len().unwrap_or(0) as u64),
        None => Ok(()),
    }
}

/// A string that will be read; containers are only referred to.
pub(super) fn look_at_text(value: &Value) -> Result<(), Error> {
    look(value.as_str().map_or(0, str::len) as u64)
}

/// A value that will be read with all that it contains.
pub(super) fn look_at_all(value: &Value) -> Result<(), Error> {
    look_at_level(value, 0)
}

fn look_at_level(value: &Value, depth: u32) -> Result<(), Error> {
    look(LOOK)?;
    look_at_text(value)?;
    if depth > DEPTH {
        return Err(exceeded("levels of containers", u64::from(DEPTH)));
    }
    match value.kind() {
        ValueKind::Seq => {
            for item in value.try_iter()? {
                look_at_level(&item, depth + 1)?;
            }
        }
        // Reading an iterable may use it up.
        ValueKind::Iterable => look(value.len().unwrap_or(0) as u64 * SLOT)?,
        ValueKind::Map => {
            for key in value.try_iter()? {
                look_at_level(&key, depth + 1)?;
                look_at_level(&value.get_item(&key)?, depth + 1)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// A value that will be read item by item into a list; a string gives one item for each character.
pub(super) fn look_at_items(value: &Value) -> Result<(), Error> {
    if let Some(text) = value.as_str() {
        make(text.len() as u64 * SLOT)?;
    }
    look_at_all(value)
}

/// A string under construction.
#[derive(Default)]
pub(super) struct Text(String);

impl Text {
    pub(super) fn push(&mut self, text: &str) -> Result<(), Error> {
        make(text.len() as u64)?;
        self.0.push_str(text);
        Ok(())
    }

    pub(super) fn finish(self) -> String {
        self.0
    }
}
