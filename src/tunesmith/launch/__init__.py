"""Files that start a run on a cluster, made from its recipe. Nothing is started here."""
