"""Language models: one client for all that speak OpenAI's protocol, and how they are started."""
