"""What a run will take, before anything is produced: memory, bytes, requests, time, cost, risk."""
