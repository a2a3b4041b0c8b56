"""HTTP ports of tasks under addresses of their own: what stands between a browser and a stream."""
