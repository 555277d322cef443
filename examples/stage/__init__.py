"""What the pages of the examples share: a web server, worker processes that a page may kill, and a look."""
