"""Plans: what a conversion will read and write, as frozen data. Planning never moves a byte."""
