(global $id (mut i32) #0)
(global $answers (mut i32) #0)
(on request_headers
  (global.set $id (local.get $id))
  (call $say @call@ (call $fetch @auth@ %:method=GET;:path=/first;:authority=auth%))
  #1)
(on http_call_response
  (global.set $answers (i32.add (global.get $answers) #1))
  (call $num @answer@ (global.get $answers))
  (if (i32.lt_u (global.get $answers) #3) (then
    (call $say @call@ (call $fetch @auth@ %:method=GET;:path=/again;:authority=auth%))
    (return)))
  (drop (call $set_effective_context (global.get $id)))
  (call $say @resume@ (call $continue_stream #0)))
