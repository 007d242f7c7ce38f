"""Tables, plots and JSON of runs, gates and teachers."""
