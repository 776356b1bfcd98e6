(global $id (mut i32) #0)
(global $answers (mut i32) #0)
(on request_headers
  (global.set $id (local.get $id))
  (call $say @one@ (call $fetch @auth@ %:method=GET;:path=/one;:authority=auth%))
  (call $say @two@ (call $fetch @auth@ %:method=GET;:path=/two;:authority=auth%))
  #1)
(on http_call_response
  (global.set $answers (i32.add (global.get $answers) #1))
  (call $show @answer@ (call $get_buffer_bytes #4 #0 #100 OUT))
  (if (i32.eq (global.get $answers) #2) (then
    (drop (call $set_effective_context (global.get $id)))
    (call $say @add@ (call $add_header_map_value #0 @x-answers@ @2@))
    (call $say @resume@ (call $continue_stream #0)))))
