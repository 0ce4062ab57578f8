"""Dead letters for operators: the letter, its filter, reading in pages, the replay, and the view of them all."""
