//! Rewrites a parsed template so that nothing it does escapes the budget.
//!
//! minijinja counts instructions, but one instruction may double a string. So each node that makes or reads a value of
//! unbounded size is wrapped in a filter that counts: `a ~ b` becomes the filter `~` on `a` with argument `b`, and so
//! on. The names of these filters cannot be written in a template. Literal text goes through the formatter as
//! expressions do.

use super::TemplateError;
use minijinja::machinery::ast::{
    BinOp, BinOpKind, Call, CallArg, CallBlock, Compare, CompareOp, CompareOpKind, Const, Do, EmitExpr, Expr, Filter,
    FilterBlock, ForLoop, GetAttr, GetItem, IfCond, IfExpr, List, Macro, Map, Set, SetBlock, Spanned, Stmt, Template,
    Test, Tuple, UnaryOp, UnaryOpKind, Var, WithBlock,
};
use minijinja::{Value, machinery::Span};

/// Counts a value that was just made.
pub(super) const MADE: &str = "#made";
/// Counts a string that is about to be read.
pub(super) const TEXT: &str = "#text";
/// Counts a value that is about to be read to its leaves.
pub(super) const ALL: &str = "#all";
/// Counts a value that is about to be made into a list.
pub(super) const ITEMS: &str = "#items";
/// A value that a loop is about to go through.
pub(super) const LOOP: &str = "#loop";
/// The container of `in`: a map is only looked into.
pub(super) const CONTAINER: &str = "#container";
/// `value[start:stop:step]`
pub(super) const SLICE: &str = "#slice";
pub(super) const CONCATENATE: &str = "~";
pub(super) const ADD: &str = "+";
pub(super) const MULTIPLY: &str = "*";

/// Filters that read a string or refer to a value, in contrast to those that read the items.
const TEXT_FILTERS: [&str; 28] = [
    "abs",
    "attr",
    "bool",
    "capitalize",
    "count",
    "d",
    "default",
    "e",
    "escape",
    "first",
    "float",
    "format",
    "indent",
    "int",
    "join",
    "last",
    "length",
    "lower",
    "replace",
    "round",
    "safe",
    "split",
    "string",
    "title",
    "tojson",
    "trim",
    "upper",
    "lines",
];
/// Tests that look at what kind of value it is.
const KIND_TESTS: [&str; 16] = [
    "boolean",
    "callable",
    "defined",
    "even",
    "false",
    "float",
    "integer",
    "iterable",
    "mapping",
    "none",
    "number",
    "odd",
    "sequence",
    "string",
    "true",
    "undefined",
];
/// Deeper nesting than any parser or compiler below needs.
const DEEPEST: u32 = 2000;

pub(super) fn guard<'s>(root: &Stmt<'s>) -> Result<Stmt<'s>, TemplateError> {
    Guard { depth: 0 }.statement(root)
}

struct Guard {
    depth: u32,
}

type Guarded<T> = Result<T, TemplateError>;

impl Guard {
    fn body<'s>(&mut self, body: &[Stmt<'s>]) -> Guarded<Vec<Stmt<'s>>> {
        body.iter().map(|statement| self.statement(statement)).collect()
    }

    fn enter(&mut self) -> Guarded<()> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(TemplateError::Limit { what: "levels of nesting", expected: u64::from(DEEPEST) });
        }
        Ok(())
    }

    fn statement<'s>(&mut self, statement: &Stmt<'s>) -> Guarded<Stmt<'s>> {
        self.enter()?;
        let guarded = match statement {
            Stmt::Template(node) => {
                Stmt::Template(Spanned::new(Template { children: self.body(&node.children)? }, node.span()))
            }
            Stmt::EmitExpr(node) => Stmt::EmitExpr(self.emit(node)?),
            Stmt::EmitRaw(node) => {
                let expr = constant(Value::from(node.raw), node.span());
                Stmt::EmitExpr(Spanned::new(EmitExpr { expr }, node.span()))
            }
            Stmt::ForLoop(node) => Stmt::ForLoop(Spanned::new(
                ForLoop {
                    target: target(&node.target)?,
                    iter: wrap(LOOP, self.expression(&node.iter)?),
                    filter_expr: self.option(node.filter_expr.as_ref())?,
                    recursive: node.recursive,
                    body: self.body(&node.body)?,
                    else_body: self.body(&node.else_body)?,
                },
                node.span(),
            )),
            Stmt::IfCond(node) => Stmt::IfCond(Spanned::new(
                IfCond {
                    expr: self.expression(&node.expr)?,
                    true_body: self.body(&node.true_body)?,
                    false_body: self.body(&node.false_body)?,
                },
                node.span(),
            )),
            Stmt::WithBlock(node) => {
                let mut assignments = Vec::with_capacity(node.assignments.len());
                for (name, value) in &node.assignments {
                    assignments.push((target(name)?, self.expression(value)?));
                }
                Stmt::WithBlock(Spanned::new(WithBlock { assignments, body: self.body(&node.body)? }, node.span()))
            }
            Stmt::Set(node) => Stmt::Set(Spanned::new(
                Set { target: target(&node.target)?, expr: self.expression(&node.expr)? },
                node.span(),
            )),
            Stmt::SetBlock(node) => Stmt::SetBlock(Spanned::new(
                SetBlock {
                    target: target(&node.target)?,
                    filter: self.option(node.filter.as_ref())?,
                    body: self.body(&node.body)?,
                },
                node.span(),
            )),
            Stmt::FilterBlock(node) => {
                let (filter, body) = (self.expression(&node.filter)?, self.body(&node.body)?);
                Stmt::FilterBlock(Spanned::new(FilterBlock { filter, body }, node.span()))
            }
            Stmt::Macro(node) => Stmt::Macro(self.macro_declaration(node)?),
            Stmt::CallBlock(node) => Stmt::CallBlock(Spanned::new(
                CallBlock { call: self.call(&node.call)?, macro_decl: self.macro_declaration(&node.macro_decl)? },
                node.span(),
            )),
            Stmt::Continue(node) => Stmt::Continue(Spanned::new(minijinja::machinery::ast::Continue, node.span())),
            Stmt::Break(node) => Stmt::Break(Spanned::new(minijinja::machinery::ast::Break, node.span())),
            Stmt::Do(node) => Stmt::Do(Spanned::new(Do { call: self.call(&node.call)? }, node.span())),
            _ => {
                let expected = "statements within one template: no include, import, extends, block, autoescape";
                return Err(TemplateError::Unsupported { got: "a statement that reaches outside".into(), expected });
            }
        };
        self.depth -= 1;
        Ok(guarded)
    }

    fn emit<'s>(&mut self, node: &Spanned<EmitExpr<'s>>) -> Guarded<Spanned<EmitExpr<'s>>> {
        // `{{ loop(items) }}` is an instruction of its own.
        let expr = match &node.expr {
            Expr::Call(call) if matches!(&call.expr, Expr::Var(name) if name.id == "loop") => {
                Expr::Call(self.call(call)?)
            }
            expr => self.expression(expr)?,
        };
        Ok(Spanned::new(EmitExpr { expr }, node.span()))
    }

    fn macro_declaration<'s>(&mut self, node: &Spanned<Macro<'s>>) -> Guarded<Spanned<Macro<'s>>> {
        let args = node.args.iter().map(target).collect::<Guarded<_>>()?;
        let defaults = self.expressions(&node.defaults)?;
        Ok(Spanned::new(Macro { name: node.name, args, defaults, body: self.body(&node.body)? }, node.span()))
    }

    fn option<'s>(&mut self, expr: Option<&Expr<'s>>) -> Guarded<Option<Expr<'s>>> {
        expr.map(|expr| self.expression(expr)).transpose()
    }

    fn expressions<'s>(&mut self, exprs: &[Expr<'s>]) -> Guarded<Vec<Expr<'s>>> {
        exprs.iter().map(|expr| self.expression(expr)).collect()
    }

    fn expression<'s>(&mut self, expr: &Expr<'s>) -> Guarded<Expr<'s>> {
        self.enter()?;
        let guarded = match expr {
            Expr::Var(node) => Expr::Var(Spanned::new(Var { id: node.id }, node.span())),
            Expr::Const(node) => constant(node.value.clone(), node.span()),
            Expr::Slice(node) => {
                let mut args = Vec::with_capacity(3);
                for bound in [&node.start, &node.stop, &node.step] {
                    let none = || constant(Value::from(()), node.span());
                    args.push(CallArg::Pos(self.option(bound.as_ref())?.unwrap_or_else(none)));
                }
                let slice = Filter { name: SLICE, expr: Some(self.expression(&node.expr)?), args };
                Expr::Filter(Spanned::new(slice, node.span()))
            }
            Expr::UnaryOp(node) => {
                let not = matches!(node.op, UnaryOpKind::Not);
                let op = if not { UnaryOpKind::Not } else { UnaryOpKind::Neg };
                Expr::UnaryOp(Spanned::new(UnaryOp { op, expr: self.expression(&node.expr)? }, node.span()))
            }
            Expr::BinOp(node) => self.binary(node)?,
            Expr::Compare(node) => {
                let mut ops = Vec::with_capacity(node.ops.len());
                for op in &node.ops {
                    let container = matches!(op.op, CompareOpKind::In | CompareOpKind::NotIn);
                    let guard = if container { CONTAINER } else { ALL };
                    ops.push(CompareOp { op: op.op, expr: counted(guard, self.expression(&op.expr)?) });
                }
                let expr = counted(ALL, self.expression(&node.expr)?);
                Expr::Compare(Spanned::new(Compare { expr, ops }, node.span()))
            }
            Expr::IfExpr(node) => Expr::IfExpr(Spanned::new(
                IfExpr {
                    test_expr: self.expression(&node.test_expr)?,
                    true_expr: self.expression(&node.true_expr)?,
                    false_expr: self.option(node.false_expr.as_ref())?,
                },
                node.span(),
            )),
            Expr::Filter(node) => self.filter(node)?,
            Expr::Test(node) => {
                let mut tested = self.expression(&node.expr)?;
                if !KIND_TESTS.contains(&node.name) {
                    tested = counted(ALL, tested);
                }
                Expr::Test(Spanned::new(
                    Test { name: node.name, expr: tested, args: self.arguments(&node.args, true)? },
                    node.span(),
                ))
            }
            Expr::GetAttr(node) => Expr::GetAttr(Spanned::new(
                GetAttr { expr: self.expression(&node.expr)?, name: node.name },
                node.span(),
            )),
            Expr::GetItem(node) => Expr::GetItem(Spanned::new(
                GetItem {
                    expr: wrap(TEXT, self.expression(&node.expr)?),
                    subscript_expr: counted(ALL, self.expression(&node.subscript_expr)?),
                },
                node.span(),
            )),
            Expr::Call(node) => wrap(MADE, Expr::Call(self.call(node)?)),
            Expr::List(node) => {
                wrap(MADE, Expr::List(Spanned::new(List { items: self.expressions(&node.items)? }, node.span())))
            }
            Expr::Tuple(node) => {
                wrap(MADE, Expr::Tuple(Spanned::new(Tuple { items: self.expressions(&node.items)? }, node.span())))
            }
            Expr::Map(node) => {
                let mut keys = Vec::with_capacity(node.keys.len());
                for key in &node.keys {
                    keys.push(counted(ALL, self.expression(key)?));
                }
                wrap(MADE, Expr::Map(Spanned::new(Map { keys, values: self.expressions(&node.values)? }, node.span())))
            }
        };
        self.depth -= 1;
        Ok(guarded)
    }

    fn binary<'s>(&mut self, node: &Spanned<BinOp<'s>>) -> Guarded<Expr<'s>> {
        let (left, right) = (self.expression(&node.left)?, self.expression(&node.right)?);
        let operation = |op, left, right| Ok(Expr::BinOp(Spanned::new(BinOp { op, left, right }, node.span())));
        let filter = |name, left, right| {
            let filter = Filter { name, expr: Some(left), args: vec![CallArg::Pos(right)] };
            Ok(Expr::Filter(Spanned::new(filter, node.span())))
        };
        match node.op {
            BinOpKind::Concat => filter(CONCATENATE, left, right),
            BinOpKind::Add => filter(ADD, left, right),
            BinOpKind::Mul => filter(MULTIPLY, left, right),
            BinOpKind::In => operation(node.op, counted(ALL, left), counted(CONTAINER, right)),
            BinOpKind::Eq | BinOpKind::Ne | BinOpKind::Lt | BinOpKind::Lte | BinOpKind::Gt | BinOpKind::Gte => {
                operation(node.op, counted(ALL, left), counted(ALL, right))
            }
            _ => operation(node.op, left, right),
        }
    }

    /// A filter on its operand, or on the text of the block around it when it has none.
    fn filter<'s>(&mut self, node: &Spanned<Filter<'s>>) -> Guarded<Expr<'s>> {
        let name = if TEXT_FILTERS.contains(&node.name) { TEXT } else { ITEMS };
        let operand = Filter { name, expr: self.option(node.expr.as_ref())?, args: Vec::new() };
        let expr = Some(Expr::Filter(Spanned::new(operand, node.span())));
        let filter = Filter { name: node.name, expr, args: self.arguments(&node.args, true)? };
        Ok(wrap(MADE, Expr::Filter(Spanned::new(filter, node.span()))))
    }

    fn call<'s>(&mut self, node: &Spanned<Call<'s>>) -> Guarded<Spanned<Call<'s>>> {
        let expr = self.expression(&node.expr)?;
        Ok(Spanned::new(Call { expr, args: self.arguments(&node.args, false)? }, node.span()))
    }

    /// Arguments; `read` says that whoever gets them reads them, and does not just hand them on.
    fn arguments<'s>(&mut self, args: &[CallArg<'s>], read: bool) -> Guarded<Vec<CallArg<'s>>> {
        let argument = |arg: &CallArg<'s>| {
            Ok(match arg {
                CallArg::Pos(expr) if read => CallArg::Pos(counted(ALL, self.expression(expr)?)),
                CallArg::Pos(expr) => CallArg::Pos(self.expression(expr)?),
                CallArg::Kwarg(name, expr) => CallArg::Kwarg(name, self.expression(expr)?),
                CallArg::PosSplat(expr) => CallArg::PosSplat(wrap(ITEMS, self.expression(expr)?)),
                CallArg::KwargSplat(expr) => CallArg::KwargSplat(wrap(ITEMS, self.expression(expr)?)),
            })
        };
        args.iter().map(argument).collect()
    }
}

/// Names that are assigned to.
fn target<'s>(expr: &Expr<'s>) -> Guarded<Expr<'s>> {
    Ok(match expr {
        Expr::Var(node) => Expr::Var(Spanned::new(Var { id: node.id }, node.span())),
        Expr::GetAttr(node) => {
            Expr::GetAttr(Spanned::new(GetAttr { expr: target(&node.expr)?, name: node.name }, node.span()))
        }
        Expr::List(node) => {
            let items = node.items.iter().map(target).collect::<Guarded<_>>()?;
            Expr::List(Spanned::new(List { items }, node.span()))
        }
        Expr::Tuple(node) => {
            let items = node.items.iter().map(target).collect::<Guarded<_>>()?;
            Expr::Tuple(Spanned::new(Tuple { items }, node.span()))
        }
        other => {
            let got = format!("an assignment to a {} in line {}", other.description(), line(other.span()));
            return Err(TemplateError::Unsupported { got, expected: "assignments to names and attributes" });
        }
    })
}

fn line(span: Span) -> usize {
    span.start_line as usize
}

fn constant<'s>(value: Value, span: Span) -> Expr<'s> {
    Expr::Const(Spanned::new(Const { value }, span))
}

fn wrap<'s>(name: &'static str, expr: Expr<'s>) -> Expr<'s> {
    let span = expr.span();
    Expr::Filter(Spanned::new(Filter { name, expr: Some(expr), args: Vec::new() }, span))
}

/// As `wrap`, but constants, which the template's own length bounds, need no counting.
fn counted<'s>(name: &'static str, expr: Expr<'s>) -> Expr<'s> {
    if matches!(expr, Expr::Const(_)) { expr } else { wrap(name, expr) }
}
