"""Row formats: messages, prompt and completion, text, ShareGPT, Alpaca, preference pairs."""
