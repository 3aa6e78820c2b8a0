"""Small tasks that ask for exactly what a design claims to do."""
