//! A loaded model that answers: a handle for any number of threads, and the engine's own thread behind it.

use super::cache::Cache;
use super::lock;
use super::markings::Markings;
use super::options::Options;
use super::profile::StepCost;
use super::request::{Completion, Event, Prompt, Request};
use super::scheduler::{Limits, Scheduler};
use super::sequence::{Answer, Purpose, Sequence};
use super::speculation::{Drafting, Host, Speculation, SpeculationReport};
use super::step::{Engine, Notices};
use super::thinking::Thinking;
use crate::detokenize::{Detokenizer, StopStrings};
use crate::error::Error;
use crate::ledger::{EngineLedger, Ledger};
use crate::load::Checkpoint;
use crate::load::text::Text;
use crate::load::{ChatTemplate, TemplateOptions, Tokenizer};
use crate::model::config::Config;
use crate::model::{MatrixReport, Model, Scratch};
use crate::reasoning::{Dialect, Lexicon};
use crate::speculative::tree::DraftTree;
use farthing_kernels::attention::PAGE;
use farthing_kernels::isa::Isa;
use farthing_kernels::pool::{Pool, default_threads};
use farthing_kernels::sample::TokenCounts;
use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Prompt rows in one step unless told otherwise.
const CHUNK: usize = 512;

/// How far a load has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes of tensors packed.
    pub done: u64,
    /// Bytes of tensors in the files.
    pub total: u64,
}

/// A loaded model. Any number of threads may use it at once; their requests share the engine's steps.
#[derive(Debug)]
pub struct Llm {
    shared: Arc<Shared>,
    ledger: Arc<Mutex<EngineLedger>>,
    notices: Arc<Mutex<Notices>>,
    thread: Option<JoinHandle<()>>,
    text: Text,
    thinking: Markings,
    config: Config,
    report: Vec<MatrixReport>,
    resident_bytes: u64,
    context: usize,
    threads: usize,
    process: u32,
    next: AtomicU64,
    dialect: OnceLock<Dialect>,
}

#[derive(Debug)]
struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Inbox {
    arrivals: Vec<Sequence>,
    cancelled: Vec<u64>,
    closing: bool,
    /// Why the engine stopped, once it has.
    stopped: Option<String>,
}

/// One answer under way. Dropping it cancels the request.
#[derive(Debug)]
pub struct Stream {
    events: Receiver<Event>,
    id: u64,
    shared: Arc<Shared>,
    ended: bool,
}

impl Llm {
    /// Loads a GGUF file, a safetensors file or a checkpoint directory; `progress` is called as tensors are packed.
    ///
    /// With drafters the first load on a machine measures what passes of several rows cost, for some seconds at most.
    pub fn load(
        path: &Path,
        options: &Options,
        speculation: Speculation,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Llm, Error> {
        options.validate()?;
        if options.experts.cache_margin.is_some() && !speculation.drafters.is_empty() {
            // Text that depends on what is in memory can't be the same with and without drafts.
            return Err(Error::unsupported("expert_cache_margin beside a drafter", "speculation=None"));
        }
        Isa::requested()?;
        let checkpoint = Checkpoint::open(path)?;
        let text = Text::of(&checkpoint)?;
        let thinking = Markings::of(&text);
        let total = checkpoint.tensors().map(|tensor| tensor.nbytes() as u64).sum();
        let report = |done| progress(Progress { done, total });
        let threads = options.threads.unwrap_or_else(default_threads);
        // A pool of our own: the global one does not survive a fork.
        let packers = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|error| Error::Stopped { reason: format!("no threads to pack with: {error}") })?;
        let mut model = packers.install(|| {
            Model::load(&checkpoint, options.weights, options.activations, Some(&options.experts), &report)
        })?;
        drop(checkpoint);
        let config = model.config().clone();
        let kv = options.kv.resolve(options.weights);
        let wanted = options.context.unwrap_or(config.context).min(config.context);
        if options.context.is_some_and(|context| context > config.context) {
            let (got, most) = (options.context.unwrap_or(0), config.context);
            return Err(Error::argument("context", got, format!("at most the model's {most} tokens")));
        }
        let pages = options.kv_pages.unwrap_or_else(|| {
            let whole = wanted.div_ceil(PAGE);
            let quarter = (memory_bytes() / 4 / Cache::page_bytes(&config, kv).max(1)) as usize;
            (whole * options.max_sequences).min(quarter.max(whole.min(64)))
        });
        let context = wanted.min(pages * PAGE);
        let mut cache = Cache::new(&config, pages, kv, options.max_sequences)?;
        let pool = Pool::new(threads);
        let threads = pool.threads();
        let (resident_bytes, matrices) = (model.resident_bytes(), model.explain());
        let mut scratch = Scratch::default();
        let cost = if speculation.drafters.is_empty() {
            StepCost::default()
        } else {
            StepCost::measure(&mut model, &mut cache, &pool, &mut scratch, context)?
        };
        let counted = model.stream_statistics();
        scratch.take_expert_bytes();
        let host = Host { model: &model, pool: &pool, tokenizer: text.tokenizer.as_deref() };
        let drafting = Drafting::new(speculation, cost, &host)?;
        let notices = Arc::new(Mutex::new(Notices::default()));
        let limits = Limits { max_sequences: options.max_sequences, chunk: options.chunk.unwrap_or(CHUNK) };
        let ledger = Arc::new(Mutex::new(EngineLedger::default()));
        let engine = Engine {
            model,
            cache,
            kv,
            pool,
            scratch,
            scheduler: Scheduler::default(),
            limits,
            context,
            drafting,
            counted,
            tokenizer: text.tokenizer.clone(),
            ledger: Arc::clone(&ledger),
            notices: Arc::clone(&notices),
        };
        let shared = Arc::new(Shared { inbox: Mutex::new(Inbox::default()), wake: Condvar::new() });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("farthing-engine".to_owned())
            .spawn(move || serve(engine, &of_thread))
            .map_err(|error| Error::Stopped { reason: format!("no thread for the engine: {error}") })?;
        Ok(Llm {
            shared,
            ledger,
            notices,
            thread: Some(thread),
            text,
            thinking,
            config,
            report: matrices,
            resident_bytes,
            context,
            threads,
            process: std::process::id(),
            dialect: OnceLock::new(),
            next: AtomicU64::new(0),
        })
    }

    /// Queues requests together, so that they can share their first step; one stream for each, in order.
    ///
    /// Nothing is queued when any of them is wrong.
    pub fn submit(&self, requests: Vec<Request>) -> Result<Vec<Stream>, Error> {
        let mut sequences = Vec::with_capacity(requests.len());
        let mut streams = Vec::with_capacity(requests.len());
        for request in requests {
            request.sampling.validate()?;
            let mut embeddings = None;
            let tokens = match request.prompt {
                Prompt::Text(text) => self.tokenizer()?.encode(&text, true),
                Prompt::Rendered(text) => self.tokenizer()?.encode(&text, false),
                Prompt::Tokens(tokens) => tokens,
                Prompt::Embeddings(given) => {
                    let expected = given.positions.len() * self.config.hidden;
                    if given.rows.len() != expected || given.rows.iter().any(|value| !value.is_finite()) {
                        let expected =
                            format!("{} rows of {} finite floats", given.positions.len(), self.config.hidden);
                        return Err(Error::argument("embeddings", format!("{} floats", given.rows.len()), expected));
                    }
                    if let Some(position) = given.positions.iter().find(|&&position| position as usize >= self.context)
                    {
                        return Err(Error::argument("positions", position, format!("below {}", self.context)));
                    }
                    let placeholders = vec![0; given.positions.len()];
                    embeddings = Some(given);
                    placeholders
                }
            };
            self.check(&tokens, 1)?;
            let (sender, events) = channel();
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            let sampling = request.sampling;
            let most = sampling.max_tokens.min(self.context - tokens.len());
            let read = if embeddings.is_some() { &[][..] } else { &tokens };
            let thinking = self.thinking.controller(&self.text, &sampling, read, most)?.map(Thinking::new);
            let answer = Answer {
                thinking,
                seed: sampling.seed.unwrap_or_else(fresh_seed),
                counts: TokenCounts::of(&tokens, &[]),
                detokenizer: self.text.tokenizer.clone().map(Detokenizer::new),
                stops: StopStrings::new(&sampling.stop)
                    .map_err(|error| Error::argument("stop", error, "texts of at least one character"))?,
                end_tokens: self.text.end_tokens.clone(),
                sampling,
                text: String::new(),
                logprobs: Vec::new(),
                events: sender,
                deaf: false,
            };
            let mut sequence = sequence(id, tokens, Purpose::Answer(Box::new(answer)));
            sequence.embeddings = embeddings;
            sequence.admit(self.context);
            sequences.push(sequence);
            streams.push(Stream { events, id, shared: Arc::clone(&self.shared), ended: false });
        }
        self.enqueue(sequences)?;
        Ok(streams)
    }

    /// Answers requests together; completions in the order of the requests.
    pub fn generate(&self, requests: Vec<Request>) -> Result<Vec<Completion>, Error> {
        self.submit(requests)?.into_iter().map(Stream::wait).collect()
    }

    /// The logits `(t, vocab)` of every token of `ids`, row-major.
    pub fn logits(&self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        let rows = Vec::with_capacity(ids.len() * self.config.vocab);
        self.rows(ids, |reply| Purpose::Logits { rows, reply })
    }

    /// The states `(t, hidden)` of every token of `ids` behind the last block and the final norm, row-major: what the head
    /// makes logits of.
    pub fn hidden(&self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        let rows = Vec::with_capacity(ids.len() * self.config.hidden);
        self.rows(ids, |reply| Purpose::States { rows, reply })
    }

    fn rows(
        &self,
        ids: &[u32],
        purpose: impl FnOnce(Sender<Result<Vec<f32>, Error>>) -> Purpose,
    ) -> Result<Vec<f32>, Error> {
        self.check(ids, 0)?;
        let (reply, answer) = channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.enqueue(vec![sequence(id, ids.to_vec(), purpose(reply))])?;
        answer.recv().unwrap_or_else(|_| Err(self.stopped()))
    }

    fn check(&self, ids: &[u32], room: usize) -> Result<(), Error> {
        if ids.is_empty() {
            return Err(Error::argument("prompt", "no tokens", "at least one token"));
        }
        if ids.len() + room > self.context {
            let most = self.context - room.min(self.context);
            return Err(Error::argument("prompt", format!("{} tokens", ids.len()), format!("at most {most} tokens")));
        }
        match ids.iter().find(|&&id| id as usize >= self.config.vocab) {
            Some(id) => Err(Error::argument("token id", id, format!("below {}", self.config.vocab))),
            None => Ok(()),
        }
    }

    fn enqueue(&self, sequences: Vec<Sequence>) -> Result<(), Error> {
        if std::process::id() != self.process {
            let reason = "the process forked, and threads do not survive a fork".to_owned();
            return Err(Error::Stopped { reason });
        }
        let mut inbox = lock(&self.shared.inbox);
        if let Some(reason) = &inbox.stopped {
            return Err(Error::Stopped { reason: reason.clone() });
        }
        inbox.arrivals.extend(sequences);
        drop(inbox);
        self.shared.wake.notify_one();
        Ok(())
    }

    fn stopped(&self) -> Error {
        let reason = lock(&self.shared.inbox).stopped.clone().unwrap_or_else(|| "it was closed".to_owned());
        Error::Stopped { reason }
    }

    /// The tokenizer; an error for checkpoints that carry none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>, Error> {
        let missing = || Error::unsupported("text without a tokenizer", "give prompts as token ids");
        self.text.tokenizer.as_ref().ok_or_else(missing)
    }

    /// The spellings of the vocabulary; made at the first call.
    pub fn lexicon(&self) -> Result<Arc<Lexicon>, Error> {
        Ok(self.thinking.lexicon(self.tokenizer()?))
    }

    /// Tokens that end an answer.
    pub fn end_tokens(&self) -> &[u32] {
        &self.text.end_tokens
    }

    /// The prompt that the chat template makes of `messages`, ready for [`Prompt::Rendered`].
    pub fn chat_prompt(
        &self,
        messages: &serde_json::Value,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, Error> {
        let (template, bos_token, eos_token) = self.chat_template()?;
        let options = TemplateOptions {
            add_generation_prompt: true,
            bos_token,
            eos_token,
            extra: variables.clone(),
            ..TemplateOptions::default()
        };
        template.render(messages, &options).map_err(|error| Error::Format(error.into()))
    }

    /// How the model is told how much to think.
    pub fn dialect(&self) -> Result<&Dialect, Error> {
        let (template, bos, eos) = self.chat_template()?;
        Ok(self.dialect.get_or_init(|| Dialect::of(template, bos.as_deref(), eos.as_deref())))
    }

    /// The chat template and the tokens it may print.
    fn chat_template(&self) -> Result<(&ChatTemplate, Option<String>, Option<String>), Error> {
        let missing = || Error::unsupported("chat with a model without a chat template", "use generate");
        let template = self.text.template.as_ref().ok_or_else(missing)?.as_ref().map_err(|error| error.clone().into());
        let tokenizer = self.text.tokenizer.as_ref();
        let name = |id: Option<u32>| id.and_then(|id| Some(tokenizer?.id_to_token(id)?.to_owned()));
        let (bos, eos) = (tokenizer.and_then(|it| it.bos()), tokenizer.and_then(|it| it.eos_ids().first().copied()));
        Ok((template.map_err(Error::Format)?, name(bos), name(eos)))
    }

    /// Whether [`Llm::chat_prompt`] works.
    pub fn has_chat_template(&self) -> bool {
        self.text.template.is_some()
    }

    /// The model's description.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Longest sequence, prompt and answer.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Bytes of packed weights.
    pub fn resident_bytes(&self) -> u64 {
        self.resident_bytes
    }

    /// Every matrix: format, kernel, bytes.
    pub fn explain(&self) -> &[MatrixReport] {
        &self.report
    }

    /// What speculation expects and has done, as of the last finished request; `None` before the first.
    pub fn speculation(&self) -> Option<SpeculationReport> {
        lock(&self.notices).speculation.clone()
    }

    /// What users should hear, once: drafters that failed.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.notices).warnings)
    }

    /// The cost of everything so far.
    pub fn ledger(&self) -> EngineLedger {
        lock(&self.ledger).clone()
    }
}

impl Drop for Llm {
    fn drop(&mut self) {
        let thread = self.thread.take();
        if std::process::id() != self.process {
            return std::mem::forget(thread);
        }
        lock(&self.shared.inbox).closing = true;
        self.shared.wake.notify_one();
        if let Some(thread) = thread {
            // The thread catches its own panics.
            let _ = thread.join();
        }
    }
}

impl Stream {
    /// The next event, or `None` when `timeout` has passed without one. After the last event, fails.
    pub fn next(&mut self, timeout: Duration) -> Option<Event> {
        let event = match self.events.recv_timeout(timeout) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => {
                let reason =
                    lock(&self.shared.inbox).stopped.clone().unwrap_or_else(|| "the stream has ended".to_owned());
                Event::Failed(Error::Stopped { reason })
            }
        };
        self.ended |= matches!(event, Event::Done(_) | Event::Failed(_));
        Some(event)
    }

    /// Waits for the end.
    pub fn wait(mut self) -> Result<Completion, Error> {
        loop {
            match self.next(Duration::from_hours(1)) {
                Some(Event::Done(completion)) => return Ok(*completion),
                Some(Event::Failed(error)) => return Err(error),
                Some(Event::Text(_) | Event::Thinking(_) | Event::Progress { .. }) | None => {}
            }
        }
    }

    /// Asks the engine to end the request; what there is of the answer arrives as its last event.
    pub fn cancel(&self) {
        lock(&self.shared.inbox).cancelled.push(self.id);
        self.shared.wake.notify_one();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.ended {
            self.cancel();
        }
    }
}

fn sequence(id: u64, tokens: Vec<u32>, purpose: Purpose) -> Sequence {
    Sequence {
        id,
        prompt: tokens.len(),
        tokens,
        embeddings: None,
        computed: 0,
        table: super::cache::Table::default(),
        tree: DraftTree::default(),
        purpose,
        ledger: Ledger::default(),
        submitted: Instant::now(),
        started: None,
        first_token: None,
    }
}

/// A seed nobody chose.
fn fresh_seed() -> u64 {
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// Physical memory of the machine; 8 GiB where it can't be read.
fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(8 << 30, |kib: u64| kib * 1024)
}

/// The engine's thread: takes requests in, steps while there is work, sleeps otherwise.
fn serve(mut engine: Engine, shared: &Shared) {
    loop {
        let mut inbox = lock(&shared.inbox);
        while engine.idle() && inbox.arrivals.is_empty() && !inbox.closing {
            inbox.cancelled.clear();
            inbox = shared.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
        if inbox.closing {
            inbox.stopped = Some("it was closed".to_owned());
            drop(inbox);
            return engine.fail_all(|| Error::Stopped { reason: "it was closed".to_owned() });
        }
        let (arrivals, cancelled) = (std::mem::take(&mut inbox.arrivals), std::mem::take(&mut inbox.cancelled));
        drop(inbox);
        for sequence in arrivals {
            engine.submit(sequence);
        }
        for id in cancelled {
            engine.cancel(id);
        }
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| engine.step())) {
            let message = payload.downcast_ref::<String>().map(String::as_str);
            let message =
                message.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message");
            let reason = format!("internal error: {message}");
            let mut inbox = lock(&shared.inbox);
            inbox.stopped = Some(reason.clone());
            let arrivals = std::mem::take(&mut inbox.arrivals);
            drop(inbox);
            for sequence in arrivals {
                engine.submit(sequence);
            }
            return engine.fail_all(|| Error::Stopped { reason: reason.clone() });
        }
    }
}
