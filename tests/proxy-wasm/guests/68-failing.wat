(global $id (mut i32) #0)
(on request_headers
  (global.set $id (local.get $id))
  (call $say @call@ (call $http_call @auth@ %:method=GET;:path=/;:authority=auth% #0 #0 #0 #0 #300 #8))
  #1)
(on http_call_response
  (call $show @status@ (call $get_header_map_value #6 @:status@ OUT))
  (call $num @trailers@ (local.get $trailers))
  (drop (call $set_effective_context (global.get $id)))
  (if (call $path @/answer@) (then (call $say @reply@ (call $reply #403 @no@)) (return)))
  (call $say @resume@ (call $continue_stream #0)))
