use farthing::engine::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let mut o = Options { context: Some(2048), ..Options::default() };
    o.weights = Weights::parse(&a[2]).unwrap();
    o.activations = Activations::parse(&a[3]).unwrap();
    let t = std::time::Instant::now();
    let llm = Llm::load(a[1].as_ref(), &o, &|_| ()).unwrap();
    eprintln!("load {:?}", t.elapsed());
    let ids: Vec<u32> = a[4].split(',').map(|x| x.parse().unwrap()).collect();
    let t = std::time::Instant::now();
    let l = llm.logits(&ids).unwrap();
    eprintln!("logits {:?}", t.elapsed());
    let bytes: Vec<u8> = l.iter().flat_map(|x| x.to_le_bytes()).collect();
    std::fs::write(&a[5], bytes).unwrap();
    let c = llm
        .generate(vec![Request {
            prompt: Prompt::Tokens(ids),
            sampling: SamplingParams { max_tokens: 24, ..Default::default() },
        }])
        .unwrap();
    eprintln!("{:?} {:?} {:#?}", c[0].token_ids, c[0].finish_reason, c[0].ledger);
}
