"""Judges that answer in words: back-ends, rubrics, parsing, modes of judging, robustness checks."""
