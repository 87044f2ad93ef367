"""How an answer is made of passages and checked: by the question service, and by `evaluate`, which measures it."""
