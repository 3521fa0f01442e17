"""Studies: the experiments of the papers as tables of runs.

`trial` says what a network of a study is, `table` lists the studies, `setting` holds what they have in common (one
dense checkpoint, the data, the recipe), `pool` trains and keeps networks, `measures` says what is looked at, `report`
makes tables and pictures. `tools.study` is the program.
"""
