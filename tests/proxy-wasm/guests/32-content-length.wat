(on request_headers (call $say @remove@ (call $remove_header_map_value #0 @content-length@)) #0)
(on request_body
  (if (i32.eqz (local.get $eos)) (then (return #1)))
  (call $say @set@ (call $set #0 #0 (local.get $n) @a longer body than it was@))
  #0)
