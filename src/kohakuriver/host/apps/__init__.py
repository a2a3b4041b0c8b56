"""HTTP ports of tasks under addresses of their own at the host: a browser needs no command line for them."""
