"""Dead letters for operators: the letter, reading them in pages, the view with its filters, the replay."""
