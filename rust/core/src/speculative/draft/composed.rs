//! Several drafters, one tree: each extends what those before it proposed, within one budget.

use super::{Draft, Drafter, Observed, Target, Wants};
use crate::error::Error;

/// Drafters in order of trust: "suffix where three tokens match, else recycling" is `[Suffix with min_match 3,
/// TokenRecycling]`, where recycling spends what the suffix leaves. Each node bears the index of its drafter.
///
/// ```
/// use farthing::speculative::draft::{Composed, Drafter, Suffix, SuffixOptions, TokenRecycling};
/// let suffix = Suffix::new(None, SuffixOptions { min_match: 3, ..SuffixOptions::default() })?;
/// let drafter = Composed::new(vec![Box::new(suffix), Box::new(TokenRecycling::default())])?;
/// assert_eq!((drafter.name(), drafter.wants().top), ("suffix + token recycling", 8));
/// # Ok::<(), farthing::error::Error>(())
/// ```
#[derive(Debug)]
pub struct Composed {
    members: Vec<Box<dyn Drafter>>,
    name: String,
    wants: Wants,
    /// What each member wants of it.
    wanted: Vec<Wants>,
}

impl Composed {
    /// All of `members`, in this order.
    pub fn new(members: Vec<Box<dyn Drafter>>) -> Result<Composed, Error> {
        if !(1..=8).contains(&members.len()) {
            return Err(Error::argument("drafters", members.len(), "1 to 8"));
        }
        let name = members.iter().map(|member| member.name()).collect::<Vec<_>>().join(" + ");
        let wanted: Vec<Wants> = members.iter().map(|member| member.wants()).collect();
        let mut hidden: Vec<usize> = wanted.iter().flat_map(|wants| wants.hidden.iter().copied()).collect();
        hidden.sort_unstable();
        hidden.dedup();
        let top = wanted.iter().map(|wants| wants.top).max().unwrap_or(0);
        Ok(Composed { members, name, wants: Wants { hidden, top }, wanted })
    }
}

/// Of each row of `from`: (rows, parts · width) the parts that `keep` names.
fn parts<T: Copy>(from: &[T], rows: usize, parts: usize, keep: &[usize]) -> Vec<T> {
    let width = from.len() / (rows * parts).max(1);
    let row = |row: &[T]| keep.iter().flat_map(|&part| row[part * width..][..width].to_vec()).collect::<Vec<_>>();
    if width == 0 { Vec::new() } else { from.chunks_exact(parts * width).flat_map(row).collect() }
}

impl Drafter for Composed {
    fn name(&self) -> &str {
        &self.name
    }

    fn wants(&self) -> Wants {
        self.wants.clone()
    }

    fn attach(&mut self, target: &dyn Target) -> Result<(), Error> {
        self.members.iter_mut().try_for_each(|member| member.attach(target))
    }

    fn begin(&mut self, request: u64, prompt: &[u32]) -> Result<(), Error> {
        self.members.iter_mut().try_for_each(|member| member.begin(request, prompt))
    }

    fn catch_up(&mut self, target: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        self.members.iter_mut().try_for_each(|member| member.catch_up(target, drafts))
    }

    fn draft(&mut self, target: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        let before: Vec<usize> = drafts.iter().map(|draft| draft.tree.len()).collect();
        for (index, member) in self.members.iter_mut().enumerate() {
            let left = |draft: &Draft<'_>, before| draft.budget.saturating_sub(draft.tree.len() - before);
            let mut shares: Vec<Draft<'_>> = drafts
                .iter_mut()
                .zip(&before)
                .map(|(draft, &before)| (left(draft, before), draft))
                .filter(|(budget, _)| *budget > 0)
                .map(|(budget, draft)| Draft { budget, tree: draft.tree, ..*draft })
                .collect();
            for share in &mut shares {
                share.tree.set_drafter(index as u8);
            }
            member.draft(target, &mut shares)?;
        }
        Ok(())
    }

    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        let Wants { hidden: layers, top: width } = &self.wants;
        for (member, wanted) in self.members.iter_mut().zip(&self.wanted) {
            let hidden = (wanted.hidden != *layers).then(|| {
                let of = |layer| layers.binary_search(layer).unwrap_or(0);
                let keep: Vec<usize> = wanted.hidden.iter().map(of).collect();
                parts(observed.hidden, observed.following.len(), layers.len(), &keep)
            });
            let top = (wanted.top != *width).then(|| {
                let keep: Vec<usize> = (0..wanted.top).collect();
                parts(observed.top, observed.rows.len(), *width, &keep)
            });
            member.observe(&Observed {
                hidden: hidden.as_deref().unwrap_or(observed.hidden),
                top: top.as_deref().unwrap_or(observed.top),
                ..*observed
            })?;
        }
        Ok(())
    }

    fn end(&mut self, request: u64) {
        self.members.iter_mut().for_each(|member| member.end(request));
    }
}
