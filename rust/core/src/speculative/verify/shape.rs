//! Where drafted tokens hang, whatever drafted them.

use super::super::tree::DraftTree;
use crate::error::Error;

/// Drafted tokens, parents before children, siblings in the order in which they were drafted; equal siblings may occur,
/// as independent draws are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    tokens: Vec<u32>,
    /// Row of each node's parent.
    parents: Vec<usize>,
    /// For each row its first child and its next sibling; 0, the root's, stands for none.
    first: Vec<usize>,
    next: Vec<usize>,
}

impl Shape {
    /// Tokens behind one another.
    pub fn chain(tokens: &[u32]) -> Shape {
        Shape::linked(tokens.to_vec(), (0..tokens.len()).collect())
    }

    /// Tokens behind the nodes that `parents` names, all of them earlier ones; `None` is the last committed token.
    pub fn tree(tokens: &[u32], parents: &[Option<usize>]) -> Result<Shape, Error> {
        if parents.len() != tokens.len() {
            let expected = format!("{}, one for each token", tokens.len());
            return Err(Error::argument("parents", parents.len(), expected));
        }
        let late = parents.iter().enumerate().find(|(node, parent)| parent.is_some_and(|parent| parent >= *node));
        if let Some((node, &Some(parent))) = late {
            let expected = "an earlier node, or -1 for the last committed token";
            return Err(Error::argument("parents", format!("{parent} for node {node}"), expected));
        }
        let rows = parents.iter().map(|parent| parent.map_or(0, |parent| parent + 1)).collect();
        Ok(Shape::linked(tokens.to_vec(), rows))
    }

    fn linked(tokens: Vec<u32>, parents: Vec<usize>) -> Shape {
        let rows = tokens.len() + 1;
        let (mut first, mut next, mut last) = (vec![0; rows], vec![0; rows], vec![0; rows]);
        for (node, &parent) in parents.iter().enumerate() {
            let row = node + 1;
            if last[parent] == 0 {
                first[parent] = row;
            } else {
                next[last[parent]] = row;
            }
            last[parent] = row;
        }
        Shape { tokens, parents, first, next }
    }

    /// Number of drafted tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing is drafted.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Whether each row has one child at most, and is right behind its parent.
    pub fn is_chain(&self) -> bool {
        self.parents.iter().enumerate().all(|(node, &parent)| parent == node)
    }

    /// The token that a row other than the root stands behind.
    pub fn token(&self, row: usize) -> u32 {
        self.tokens[row - 1]
    }

    /// The row before it; the root has none.
    pub fn parent(&self, row: usize) -> Option<usize> {
        row.checked_sub(1).map(|node| self.parents[node])
    }

    /// The rows from one up to the root, which is left out.
    pub fn path(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(Some(row), |&row| self.parent(row)).filter(|&row| row != 0)
    }

    /// Rows behind a row, in the order in which they were drafted.
    pub fn children(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        let some = |row: usize| (row != 0).then_some(row);
        std::iter::successors(some(self.first[row]), move |&child| self.sibling(child))
    }

    /// The next child of the same parent.
    pub(super) fn sibling(&self, row: usize) -> Option<usize> {
        (self.next[row] != 0).then_some(self.next[row])
    }

    /// The first child of a row that is `token`.
    pub fn child(&self, row: usize, token: u32) -> Option<usize> {
        self.children(row).find(|&child| self.token(child) == token)
    }

    pub(super) fn has_children(&self, row: usize) -> bool {
        self.first.get(row).is_some_and(|&first| first != 0)
    }

    /// Whether a pass of `rows` rows over `width` tokens is one over this draft.
    pub(super) fn check(&self, rows: usize, width: usize) -> Result<(), Error> {
        if rows != self.len() + 1 {
            let expected = format!("{}, one more than drafted tokens", self.len() + 1);
            return Err(Error::argument("p", format!("{rows} rows"), expected));
        }
        match self.tokens.iter().find(|&&token| token as usize >= width) {
            Some(token) => Err(Error::argument("tokens", token, format!("ids below {width}, the length of a row"))),
            None => Ok(()),
        }
    }
}

impl From<&DraftTree> for Shape {
    fn from(tree: &DraftTree) -> Shape {
        let tokens = tree.nodes().iter().map(|node| node.token).collect();
        Shape::linked(
            tokens,
            tree.nodes().iter().map(|node| node.parent.map_or(0, |parent| parent as usize + 1)).collect(),
        )
    }
}
