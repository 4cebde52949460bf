"""Other engines behind the same server: their OpenAI servers run as child processes that only this one talks to."""
