//! What a template does with a variable that whoever renders it may give: whether it reads it, and which texts it
//! compares it with.
//!
//! Followed are other names for the variable (`set`, `with`, arguments of macros), filters and methods on it, choices
//! between it and a default, lists and maps that have names.

use minijinja::Value;
use minijinja::machinery::ast::{BinOpKind, Call, CallArg, CompareOpKind, Expr, Macro, Stmt};
use std::collections::BTreeSet;

/// What a template does with a variable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// It is read somewhere.
    pub read: bool,
    /// Texts that it is compared with, looked up under, or replaced by where it is missing; sorted.
    pub literals: BTreeSet<String>,
}

/// Rounds that names of names are followed for.
const ROUNDS: usize = 8;
/// Deeper expressions are not looked into; the guard refuses them anyway.
const DEEPEST: u32 = 2000;

pub(super) fn uses(root: &Stmt<'_>, variable: &str) -> Uses {
    let mut scan = Scan::default();
    scan.names.insert(variable);
    let mut known = 0;
    for _ in 0..ROUNDS {
        scan.statement(root, 0);
        // Names found late in the source may stand early in it.
        let now = scan.names.len() + scan.attributes.len() + scan.containers.len() + scan.macros.len();
        if now == known {
            break;
        }
        known = now;
    }
    scan.uses
}

#[derive(Default)]
struct Scan<'t> {
    /// Names of the value.
    names: BTreeSet<&'t str>,
    /// Attributes that hold it: namespaces have them.
    attributes: BTreeSet<&'t str>,
    /// Lists and maps that have names, with their texts.
    containers: Vec<(&'t str, Vec<String>)>,
    macros: Vec<(&'t str, Vec<&'t str>)>,
    uses: Uses,
}

impl<'t> Scan<'t> {
    fn body(&mut self, body: &[Stmt<'t>], depth: u32) {
        for statement in body {
            self.statement(statement, depth);
        }
    }

    fn statement(&mut self, statement: &Stmt<'t>, depth: u32) {
        if depth > DEEPEST {
            return;
        }
        let deeper = depth + 1;
        match statement {
            Stmt::Template(node) => self.body(&node.children, deeper),
            Stmt::EmitExpr(node) => self.expression(&node.expr, deeper),
            Stmt::ForLoop(node) => {
                self.expression(&node.iter, deeper);
                node.filter_expr.iter().for_each(|expr| self.expression(expr, deeper));
                self.body(&node.body, deeper);
                self.body(&node.else_body, deeper);
            }
            Stmt::IfCond(node) => {
                self.expression(&node.expr, deeper);
                self.body(&node.true_body, deeper);
                self.body(&node.false_body, deeper);
            }
            Stmt::WithBlock(node) => {
                for (target, value) in &node.assignments {
                    self.assignment(target, value, deeper);
                }
                self.body(&node.body, deeper);
            }
            Stmt::Set(node) => self.assignment(&node.target, &node.expr, deeper),
            Stmt::SetBlock(node) => self.body(&node.body, deeper),
            Stmt::FilterBlock(node) => {
                self.expression(&node.filter, deeper);
                self.body(&node.body, deeper);
            }
            Stmt::Macro(node) => self.declaration(node, deeper),
            Stmt::CallBlock(node) => {
                self.call(&node.call, deeper);
                self.declaration(&node.macro_decl, deeper);
            }
            Stmt::Do(node) => self.call(&node.call, deeper),
            _ => {}
        }
    }

    fn declaration(&mut self, node: &Macro<'t>, depth: u32) {
        let parameters = node.args.iter().map(|arg| if let Expr::Var(name) = arg { name.id } else { "" }).collect();
        if !self.macros.iter().any(|(name, _)| *name == node.name) {
            self.macros.push((node.name, parameters));
        }
        self.body(&node.body, depth);
    }

    fn assignment(&mut self, target: &Expr<'t>, value: &Expr<'t>, depth: u32) {
        self.expression(value, depth);
        let (name, names) = match target {
            Expr::Var(name) => (name.id, &self.names),
            Expr::GetAttr(attribute) => (attribute.name, &self.attributes),
            _ => return,
        };
        if names.contains(name) {
            self.uses.literals.extend(text(value));
        }
        if self.stands_for(value, depth) {
            let attribute = matches!(target, Expr::GetAttr(_));
            let names = if attribute { &mut self.attributes } else { &mut self.names };
            names.insert(name);
        }
        if let Some(items) = items(value)
            && !self.containers.iter().any(|(known, _)| *known == name)
        {
            self.containers.push((name, items));
        }
    }

    /// Whether the expression is the value, perhaps changed a little; defaults that are found on the way are literals.
    fn stands_for(&mut self, expr: &Expr<'t>, depth: u32) -> bool {
        if depth > DEEPEST {
            return false;
        }
        let deeper = depth + 1;
        match expr {
            Expr::Var(name) => self.names.contains(name.id),
            Expr::GetAttr(node) => matches!(&node.expr, Expr::Var(_)) && self.attributes.contains(node.name),
            Expr::Filter(node) => {
                let stands = node.expr.as_ref().is_some_and(|inner| self.stands_for(inner, deeper));
                if stands && matches!(node.name, "default" | "d") {
                    self.uses.literals.extend(node.args.first().and_then(argument).and_then(text));
                }
                stands
            }
            // `effort.lower()`
            Expr::Call(node) => match &node.expr {
                Expr::GetAttr(method) => self.stands_for(&method.expr, deeper),
                _ => false,
            },
            Expr::IfExpr(node) => {
                let first = self.stands_for(&node.true_expr, deeper);
                let second = node.false_expr.as_ref().is_some_and(|other| self.stands_for(other, deeper));
                if first != second {
                    let other = if first { node.false_expr.as_ref() } else { Some(&node.true_expr) };
                    self.uses.literals.extend(other.and_then(text));
                }
                first || second
            }
            Expr::BinOp(node) if matches!(node.op, BinOpKind::ScOr) => {
                let stands = self.stands_for(&node.left, deeper);
                if stands {
                    self.uses.literals.extend(text(&node.right));
                }
                stands
            }
            _ => false,
        }
    }

    fn expression(&mut self, expr: &Expr<'t>, depth: u32) {
        if depth > DEEPEST {
            return;
        }
        let deeper = depth + 1;
        match expr {
            Expr::Var(name) => self.uses.read |= self.names.contains(name.id),
            Expr::Const(_) => {}
            Expr::Slice(node) => {
                self.expression(&node.expr, deeper);
                for bound in [&node.start, &node.stop, &node.step].into_iter().flatten() {
                    self.expression(bound, deeper);
                }
            }
            Expr::UnaryOp(node) => self.expression(&node.expr, deeper),
            Expr::BinOp(node) => {
                match node.op {
                    BinOpKind::Eq | BinOpKind::Ne => self.equality(&node.left, &node.right, deeper),
                    BinOpKind::In => self.membership(&node.left, &node.right, deeper),
                    _ => {}
                }
                self.expression(&node.left, deeper);
                self.expression(&node.right, deeper);
            }
            Expr::Compare(node) => {
                let mut left = &node.expr;
                self.expression(left, deeper);
                for op in &node.ops {
                    match op.op {
                        CompareOpKind::Eq | CompareOpKind::Ne => self.equality(left, &op.expr, deeper),
                        CompareOpKind::In | CompareOpKind::NotIn => self.membership(left, &op.expr, deeper),
                        _ => {}
                    }
                    self.expression(&op.expr, deeper);
                    left = &op.expr;
                }
            }
            Expr::IfExpr(node) => {
                self.stands_for(expr, deeper);
                self.expression(&node.test_expr, deeper);
                self.expression(&node.true_expr, deeper);
                node.false_expr.iter().for_each(|other| self.expression(other, deeper));
            }
            Expr::Filter(node) => {
                self.stands_for(expr, deeper);
                node.expr.iter().for_each(|inner| self.expression(inner, deeper));
                self.arguments(&node.args, deeper);
            }
            Expr::Test(node) => {
                if let Some(other) = node.args.first().and_then(argument) {
                    match node.name {
                        "eq" | "equalto" | "==" | "ne" | "!=" | "sameas" => self.equality(&node.expr, other, deeper),
                        "in" => self.membership(&node.expr, other, deeper),
                        _ => {}
                    }
                }
                self.expression(&node.expr, deeper);
                self.arguments(&node.args, deeper);
            }
            Expr::GetAttr(node) => self.expression(&node.expr, deeper),
            Expr::GetItem(node) => {
                self.membership(&node.subscript_expr, &node.expr, deeper);
                self.expression(&node.expr, deeper);
                self.expression(&node.subscript_expr, deeper);
            }
            Expr::Call(node) => self.call(node, deeper),
            Expr::List(node) => node.items.iter().for_each(|item| self.expression(item, deeper)),
            Expr::Tuple(node) => node.items.iter().for_each(|item| self.expression(item, deeper)),
            Expr::Map(node) => {
                node.keys.iter().chain(&node.values).for_each(|item| self.expression(item, deeper));
            }
        }
    }

    fn call(&mut self, node: &Call<'t>, depth: u32) {
        match &node.expr {
            // `levels.get(effort)`
            Expr::GetAttr(method) if method.name == "get" => {
                if let Some(key) = node.args.first().and_then(argument) {
                    self.membership(key, &method.expr, depth);
                }
            }
            Expr::Var(function) => {
                let parameters = self.macros.iter().find(|(name, _)| *name == function.id);
                let parameters = parameters.map(|(_, parameters)| parameters.clone()).unwrap_or_default();
                for (arg, parameter) in node.args.iter().zip(parameters) {
                    if argument(arg).is_some_and(|arg| self.stands_for(arg, depth)) {
                        self.names.insert(parameter);
                    }
                }
            }
            _ => {}
        }
        self.expression(&node.expr, depth);
        self.arguments(&node.args, depth);
    }

    fn arguments(&mut self, args: &[CallArg<'t>], depth: u32) {
        for arg in args {
            let (CallArg::Pos(expr) | CallArg::Kwarg(_, expr) | CallArg::PosSplat(expr) | CallArg::KwargSplat(expr)) =
                arg;
            self.expression(expr, depth);
        }
    }

    fn equality(&mut self, left: &Expr<'t>, right: &Expr<'t>, depth: u32) {
        for (value, other) in [(left, right), (right, left)] {
            if let Some(literal) = text(other)
                && self.stands_for(value, depth)
            {
                self.uses.literals.insert(literal);
            }
        }
    }

    fn membership(&mut self, value: &Expr<'t>, container: &Expr<'t>, depth: u32) {
        if !self.stands_for(value, depth) {
            return;
        }
        let named = |name: &str| self.containers.iter().find(|(known, _)| *known == name);
        let found = match container {
            Expr::Var(name) => named(name.id).map(|(_, items)| items.clone()),
            Expr::GetAttr(attribute) => named(attribute.name).map(|(_, items)| items.clone()),
            container => items(container),
        };
        self.uses.literals.extend(found.unwrap_or_default());
    }
}

fn argument<'e, 't>(arg: &'e CallArg<'t>) -> Option<&'e Expr<'t>> {
    match arg {
        CallArg::Pos(expr) | CallArg::Kwarg(_, expr) => Some(expr),
        CallArg::PosSplat(_) | CallArg::KwargSplat(_) => None,
    }
}

fn text(expr: &Expr<'_>) -> Option<String> {
    match expr {
        Expr::Const(node) => node.value.as_str().map(str::to_owned),
        _ => None,
    }
}

/// Texts in a list or a tuple, keys of a map.
fn items(expr: &Expr<'_>) -> Option<Vec<String>> {
    let texts = |items: &[Expr<'_>]| Some(items.iter().filter_map(text).collect());
    match expr {
        Expr::List(node) => texts(&node.items),
        Expr::Tuple(node) => texts(&node.items),
        Expr::Map(node) => texts(&node.keys),
        Expr::Const(node) if node.value.as_str().is_none() => {
            let items = node.value.try_iter().ok()?;
            Some(items.filter_map(|item: Value| item.as_str().map(str::to_owned)).collect())
        }
        _ => None,
    }
}
