//! Fewer steps: several tokens proposed cheaply, verified in one pass, and never another text than without.

pub mod align;
pub mod controller;
pub mod draft;
pub mod tree;
pub mod verify;
