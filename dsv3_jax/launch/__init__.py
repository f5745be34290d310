"""Starting a run on many machines, and ending it as one: `dsv3 launch`, and what `dsv3 train` does in each process."""
