"""Learn a small WordPiece vocabulary for a corpus: corpus -> word counts -> pieces -> tokenizer. No torch."""
