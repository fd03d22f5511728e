"""The bundled model organisms: text from datasets/, tokenizer, training, weights."""
