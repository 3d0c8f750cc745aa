use std::sync::Arc; use crate::load::tokenizer::Tokenizer;
#[derive(Debug)] pub struct Detokenizer; impl Detokenizer { pub fn new(_:Arc<Tokenizer>)->Self{Self} pub fn push(&mut self,_:u32)->String{String::new()} pub fn finish(&mut self)->String{String::new()} }
#[derive(Debug)] pub struct StopStrings; pub struct Found{pub text:String,pub stopped:bool}
impl StopStrings { pub fn new(_:&[String])->Result<Self,String>{Ok(Self)} pub fn push(&mut self,p:&str)->Found{Found{text:p.to_string(),stopped:false}} pub fn stopped(&self)->bool{false} pub fn finish(&mut self)->String{String::new()} }
