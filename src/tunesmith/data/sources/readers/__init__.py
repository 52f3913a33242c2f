"""Files as streams of rows: a module for each kind of file; none is held in memory whole."""
