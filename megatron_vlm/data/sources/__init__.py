"""Where samples come from: annotation files and shard folders behind one interface, and mixtures of them.

Modules here read samples. They do not encode, measure or pack them, and they never write data.
"""
