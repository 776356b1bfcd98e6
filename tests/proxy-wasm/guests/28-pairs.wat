(on request_headers
  (call $say @set@ (call $set_header_map_pairs #0 %:method=GET;:path=/set;:authority=reviews;:scheme=http;x-only=1;x-dup=a;x-dup=b%))
  #0)
