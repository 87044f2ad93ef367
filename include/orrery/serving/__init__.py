"""The service that answers questions from a knowledge base, with sources."""
