"""What is wrong with an input, found before a network sees it."""
