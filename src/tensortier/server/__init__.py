"""The server: OpenAI's interface, the page and its own one, and the models behind them."""
